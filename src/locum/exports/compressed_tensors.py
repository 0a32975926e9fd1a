"""A checkpoint in the number formats of compressed-tensors, for engines without Locum: checkpoints/compression.py writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..checkpoints.application import complete_checkpoint
from ..checkpoints.compression import Compression, expert_weights, stacked_experts
from ..checkpoints.read import load_tokenizer
from ..checkpoints.rewrite import SHARD
from ..checkpoints.side_files import side_files
from ..checkpoints.skeleton import Source, layouts_of, open_source
from ..checkpoints.weight_files import is_adapter
from ..files import check_room, whole
from ..formats.schemes import SCHEMES, Scheme, scheme_of
from ..options import option
from .experts_seen import experts_seen
from .folder import describe
from .stock import merged_first, nearest, stock_faults
from .target import target

AROUND = 2**20  # bytes of what is written beside the tensors


@target("compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors:
    """A folder in 4 or 8 bits that vLLM, SGLang and transformers read without Locum, of a checkpoint in the stock layout."""

    kind: ClassVar[str] = "folder"
    bits: str = option("4", f"of experts, or the name of a format: {', '.join(SCHEMES)}", choices=SCHEMES)
    group: int = option(32, "weights with one scale, for 4 and 8 bits: 32, 64 or 128")
    rest: str = option(
        None,
        f"attention, shared experts and the output head too, in {', '.join(SCHEMES)}; default: as they are",
        choices=SCHEMES,
        kind=str,
    )
    statistics: str = option(
        None,
        "statistics of this checkpoint: experts in 4 or 8 bits are chosen by GPTQ; default: to the nearest",
        kind=str,
    )

    def fault(self, model: Path) -> str:
        if is_adapter(model):
            return merged_first(model)
        if layouts_of(model):
            if faults := stock_faults(model):
                return f"compressed-tensors needs the stock layout, which cannot hold {'; '.join(faults)}; {nearest(model)}"
            return (
                f"compressed-tensors needs the stock layout; write whole experts first: "
                f"locum export {model} --to stock --out STOCK"
            )
        scheme, source = scheme_of(self.bits, self.group), open_source(model)
        if source.quantization:
            return "it is quantised already; export the checkpoint that has numbers"
        if name := stacked_experts(source):
            return f"compressed-tensors keeps each expert's weights apart, and the files have those of a layer in one ({name})"
        return _uneven(source, scheme)

    def write(self, model: Path, out: Path) -> str:
        """Raises StatisticsError for statistics of another checkpoint, or without Gram matrices."""
        experts = scheme_of(self.bits, self.group)
        rest = None if self.rest is None else scheme_of(self.rest, self.group)
        grams = None if self.statistics is None else experts_seen(Path(self.statistics), model)
        source, tokenizer = open_source(model), load_tokenizer(model)
        made = Compression(source, experts, rest, grams)
        words = f"compressed-tensors, experts in {experts.words}" + (f", {self._rest(made, rest)}" if rest else "")
        card, notes = describe(
            source.config, model, out, f"without training, in few bits ({words}): it loads without Locum"
        )
        check_room(out, made.bytes + AROUND + sum(file.stat().st_size for file in side_files(model)))
        with whole(out, "folder") as folder:
            made.write(folder, SHARD)
            complete_checkpoint(folder, tokenizer, None, card, model, notes)
        return words

    def _rest(self, made: Compression, rest: Scheme) -> str:
        left = f" ({len(made.left)} matrices stay numbers, such as {made.left[0]})" if made.left else ""
        return f"attention and other linear layers in {rest.words}{left}"


def _uneven(source: Source, scheme: Scheme) -> str:
    """Why experts' rows cannot be cut into whole groups, or ''."""
    for name in expert_weights(source, scheme):
        if not scheme.can_hold(shape := source.headers[name]["shape"]):
            return (
                f"{scheme.words} needs rows of whole groups of {scheme.columns}, and {name} has shape {shape}; choose a smaller "
                f"--group, or --bits fp8"
            )
    return ""
