"""An importance matrix for llama.cpp's own quantiser, from the statistics of calibration.

llama.cpp weighs the error of each column of a matrix by the mean square of what goes into it. Those are the diagonals of the Gram
matrices that calibration has. In the file they are sums and counts, for every expert of the stacked matrices of a layer:

    blk.N.ffn_{gate,up,down}_exps.weight.in_sum2 [E, inputs]    .counts [E, 1]

An expert that saw few tokens borrows its layer's, as it does in Locum's own quantisers, so none has a count of zero.

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..checkpoints.weight_files import is_adapter
from ..errors import OptionError
from ..experts.quantisers import BORROWED
from ..files import whole
from ..options import option
from ..shapes import LayerShape
from .experts_seen import ExpertsSeen, experts_seen
from .stock import has_stock_layout, merged_first
from .target import target

NUMBER = re.compile(r"\.(\d+)\.")  # of a decoder layer


@target("imatrix")
@dataclass(frozen=True)
class ImportanceMatrix:
    """A file for `llama-quantize --imatrix`, from statistics of a checkpoint in the stock layout."""

    kind: ClassVar[str] = "file"
    statistics: str = option(None, "statistics of this checkpoint, with Gram matrices", kind=str)

    def fault(self, model: Path) -> str:
        if is_adapter(model):
            return merged_first(model)
        if not has_stock_layout(model):
            return "an importance matrix is for checkpoints in the stock layout, which become GGUF files"
        if self.statistics is None:
            return f"it is made from statistics: locum calibrate {model} ..., then --statistics FILE"
        return ""

    def write(self, model: Path, out: Path) -> str:
        """Raises OptionError where the gguf package is not there, StatisticsError for statistics of another checkpoint."""
        if importlib.util.find_spec("gguf") is None:
            raise OptionError(
                "an importance matrix is written by the gguf package, which is not installed: pip install gguf"
            )
        seen = experts_seen(Path(self.statistics), model)
        layers = seen.statistics.shape.layers
        with whole(out) as scratch:
            _write(scratch, seen, layers)
        few = sum(int((seen.tokens(layer.name) < BORROWED * layer.hidden_size).sum()) for layer in layers)
        return f"an importance matrix of {len(layers)} layers; {few} experts borrow more than they saw"


def _write(file: Path, seen: ExpertsSeen, layers: tuple[LayerShape, ...]) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "imatrix")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(seen.statistics.domains))
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", max(1, int(seen.statistics.tokens)))
    for layer in layers:
        for name, tensor in _of_layer(layer, seen).items():
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _of_layer(layer: LayerShape, seen: ExpertsSeen) -> dict[str, Any]:
    grams = [seen(layer.name, e) for e in range(layer.num_experts)]
    squares = [torch.stack([pair[i].diagonal() for pair in grams]) for i in (0, 1)]  # [E, D] and [E, F]
    found = NUMBER.search(layer.name)
    tensors = {}
    for matrix, mean_EI in (("gate", squares[0]), ("up", squares[0]), ("down", squares[1])):
        counts_E1 = (seen.tokens(layer.name) + BORROWED * mean_EI.shape[1])[:, None]
        name = f"blk.{found[1] if found else 0}.ffn_{matrix}_exps.weight"
        tensors[f"{name}.in_sum2"] = (mean_EI * counts_E1).float().numpy()
        tensors[f"{name}.counts"] = counts_E1.float().numpy()
    return tensors
