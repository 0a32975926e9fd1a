"""Weights of a checkpoint in the number formats of compressed-tensors, tensor by tensor: no model is built.

Every expert's matrices are packed, and the linear layers of the decoder and the output head where they are asked for. All else
keeps its bytes and its name: embeddings, norms, routers and whatever else is a gate, and what has no whole groups. A matrix is
read some rows at a time, so memory holds a few million numbers, whatever the size of the model.

Letters: E experts, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key

from ..errors import CheckpointError
from ..experts.quantisers import QUANTISERS, Gram
from ..formats.format import part_name
from ..formats.plain import ENTRIES, FLOAT_ENTRIES
from ..formats.schemes import Scheme, quantization_config
from ..models.conversions import named_alike, names_in_files
from ..models.decoder_layers import decoder_stack
from .cuts import find_cuts
from .empty_model import locum_layers
from .placing import LocumConfig
from .rewrite import Step
from .shard_reader import ShardReader
from .shard_writer import Entry, ShardWriter
from .skeleton import Source

NUMBERS = 2**22  # of a matrix that are in memory at a time
EXPERTS = (
    r"re:.*\.experts\.\d+\..*"  # the modules that experts are to engines, and were in files before they were fused
)
GATE = re.compile(r"(^|[._])(gate|router)$")


@dataclass(frozen=True)
class Weight:
    """A matrix that is packed. Experts' are named by layer and number."""

    scheme: Scheme
    layer: str = ""
    expert: int = -1
    is_down: bool = False


class Compression:
    """What becomes of a checkpoint: its config, the steps to its files, and their size. No weight is read to make it.

    `grams(layer, expert)` gives the mean Gram matrices of what goes into an expert and of what is in it; without, numbers are the
    nearest. Without a scheme for experts, they stay as they are, containers too, and so does a tied head. Raises UnsupportedModel and CheckpointError for files whose experts cannot be told apart.
    """

    def __init__(
        self,
        source: Source,
        experts: Scheme | None,
        rest: Scheme | None = None,
        grams: Callable[[str, int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._source, self._grams = source, grams
        self._files = ShardReader(source.stored)
        self._known: dict[tuple[str, tuple[int, ...], torch.dtype], dict[str, Tensor]] = {}
        self._heads = {} if experts is None else _tied_heads(source)
        self.weights = {} if experts is None else expert_weights(source, experts)
        asked = rest_weights(source) if rest is not None else []
        alike = {*named_alike(source.model, {name: source.places[name].name for name in asked}, "weight_scale")}
        self.rest = {n: Weight(rest) for n in asked if n in alike and rest.can_hold(source.headers[n]["shape"])}
        self.left = [name for name in asked if name not in self.rest]
        self._experts_scheme, self._rest_scheme = experts, rest
        self.steps = list(self._all_steps())

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def config(self) -> Any:
        """The checkpoint's, with what it says of number formats."""
        config, groups = copy.deepcopy(self._source.config), []
        if self._experts_scheme is not None:
            groups.append(self._experts_scheme.group([EXPERTS], experts=True))
        if self.rest:
            groups.append(self._rest_scheme.group(self._modules(), experts=False))
        said = quantization_config(groups)
        if containers := locum_layers(config):
            said = LocumConfig(containers, rest=said)
        config.quantization_config = said
        return config

    def write(self, folder: Path, limit: int) -> None:
        """Config and weights into a folder."""
        self.config.save_pretrained(folder)
        entries = {name: entry for step in self.steps for name, entry in step.entries.items()}
        writer = ShardWriter(folder, entries, limit)
        for step in self.steps:
            step.fill(writer)
        writer.finish()

    def _modules(self) -> list[str]:
        """The modules of the rest by their names in the files, and by those in transformers, where these are others."""
        names = {**dict.fromkeys(self.rest), **dict.fromkeys(self._source.places[name].name for name in self.rest)}
        return sorted((name.removesuffix(".weight") for name in names), key=dot_natural_key)

    # --- steps

    def _all_steps(self) -> Iterator[Step]:
        for name in sorted(self._source.headers, key=dot_natural_key):
            weight = self.weights.get(name) or self.rest.get(name)
            yield self._copying(name, name) if weight is None else self._packing(name, weight)
        for head, embedding in self._heads.items():
            yield self._copying(embedding, head)

    def _copying(self, name: str, new: str) -> Step:
        entry = Entry.of(self._files.entries[name])

        def fill(writer: ShardWriter) -> None:
            writer.write(new, self._files.pieces(name, [(0, entry.nbytes)]))

        return Step({new: entry}, fill)

    def _packing(self, name: str, weight: Weight) -> Step:
        shape, dtype = tuple(self._files.shape(name)), self._files.dtype(name)
        made = self._without_numbers(weight.scheme, shape, dtype)
        entries = {
            part_name(name, part): Entry(ENTRIES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
            for part, tensor in made.items()
        }

        def fill(writer: ShardWriter) -> None:
            done = dict.fromkeys(made, 0)
            for piece_OI in self._pieces(name, *shape, weight.scheme.by_rows):
                parts = weight.scheme.packed(self._levels(piece_OI, weight), shape, dtype)
                for part, tensor in parts.items():
                    if part == "_shape" and done[part]:  # one for all rows
                        continue
                    data = _bytes(tensor)
                    writer.write(part_name(name, part), [data], done[part])
                    done[part] += len(data)

        return Step(entries, fill)

    def _without_numbers(self, scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts of a matrix. A checkpoint has a hundred thousand, of a few shapes."""
        key = scheme.words, shape, dtype
        if key not in self._known:
            self._known[key] = scheme.entries(shape, dtype)
        return self._known[key]

    def _pieces(self, name: str, rows: int, columns: int, by_rows: bool) -> Iterator[Tensor]:
        step = max(1, NUMBERS // columns) if by_rows else rows
        for begin in range(0, rows, step):
            piece_OI = self._files.rows(name, begin, min(begin + step, rows)).float()
            if not bool(piece_OI.isfinite().all()):
                raise CheckpointError(f"numbers of {name} are not finite; fetch the checkpoint again")
            yield piece_OI

    def _levels(self, piece_OI: Tensor, weight: Weight) -> dict[str, Tensor]:
        gram = None
        if self._grams is not None and weight.layer:
            gram = Gram(self._grams(weight.layer, weight.expert)[weight.is_down])
        quantiser = QUANTISERS["nearest" if gram is None else "gptq"]
        return quantiser.parts(piece_OI, gram, weight.scheme.levels)


def expert_weights(source: Source, scheme: Scheme) -> dict[str, Weight]:
    """Experts' matrices by their names in the files, those of layers that transformers leaves out among them."""
    found = {}
    cuts = find_cuts(source.model, source.layers, source.headers, source.places)
    for layer in source.layers:
        for cut in cuts[layer.shape.name].experts:
            if cut.axis is None and len(source.headers[cut.names[0]]["shape"]) == 2:
                is_down = source.places[cut.names[0]].name.endswith("down_proj")
                found |= {n: Weight(scheme, layer.shape.name, e, is_down) for e, n in enumerate(cut.names)}
    ends = {name.rpartition(".experts.")[2].partition(".")[2] for name in found}
    for name in source.unread:
        of_expert = name.rpartition(".experts.")[2]
        if of_expert != name and of_expert.partition(".")[2] in ends:
            found[name] = Weight(scheme)
    return found


def rest_weights(source: Source) -> list[str]:
    """The matrices of linear layers in the decoder, and of the output head, that are no expert's, no router's and no gate's."""
    model = source.model
    prefix, _ = decoder_stack(model, [layer.shape.name for layer in source.layers])
    routers = {id(module) for layer in source.layers for module in layer.router.modules()}
    head, tied = model.get_output_embeddings(), model.all_tied_weights_keys
    files = {place.name: name for name, place in source.places.items() if not place.converted}
    found = []
    for name, module in model.named_modules():
        inside = module is head or name.startswith(f"{prefix}.")
        if not inside or type(module) is not nn.Linear or id(module) in routers or GATE.search(name):
            continue
        file = files.get(f"{name}.weight")
        if file is not None and f"{name}.weight" not in tied and ".experts." not in file:
            found.append(file)
    return [name for name in found if source.headers[name]["dtype"] in FLOAT_ENTRIES]


def stacked_experts(source: Source) -> str:
    """A tensor that has all experts of a layer side by side, or ''."""
    cuts = find_cuts(source.model, source.layers, source.headers, source.places)
    stacked = (cut.names[0] for one in cuts.values() for cut in one.experts if cut.axis is not None)
    return next(stacked, "")


def _tied_heads(source: Source) -> dict[str, str]:
    """Output heads that files leave out because they are tied, by their names in the files: what they are tied to.

    vLLM's classes of a dozen families never tie them, and leave them uninitialised in silence.
    """
    ties = {tied: to for tied, to in source.model.all_tied_weights_keys.items() if tied not in source.headers}
    both = names_in_files(source.model, [*ties, *ties.values()]) if ties else {}
    return {both[tied]: both[to] for tied, to in ties.items() if both[to] in source.headers}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
