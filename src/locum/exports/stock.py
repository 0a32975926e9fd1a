"""The stock layout: every expert's base, adapter and bias become whole weights. It computes the same and is larger.

A stock layout has one number of experts for all layers, and whole experts alone.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..checkpoints.load import load_model
from ..checkpoints.notes import plan_of, read_notes
from ..checkpoints.read import load_tokenizer, read_config
from ..checkpoints.skeleton import is_compressed, layouts_of, read_shape, skeleton
from ..checkpoints.weight_files import is_adapter
from ..models.families import find_layers
from ..shapes import LayerShape, ModelShape
from .folder import save_folder
from .target import target
from .tied_head import lacks_head, with_head
from .whole_experts import beyond_weights, to_stock


@target("stock")
@dataclass(frozen=True)
class Stock:
    """A folder with whole experts and an output head, which any engine reads."""

    kind: ClassVar[str] = "folder"

    def fault(self, model: Path) -> str:
        if has_stock_layout(model):
            return "" if lacks_head(model) else "it has the stock layout already; there is nothing to export"
        if faults := stock_faults(model):
            return f"the stock layout cannot hold {'; '.join(faults)}; {nearest(model)}"
        return ""

    def write(self, model: Path, out: Path) -> str:
        tokenizer = load_tokenizer(model)
        live = with_head(to_stock(load_model(model)))
        layouts = layouts_of(model).values()
        width = find_layers(live)[0].shape.expert_width
        is_narrow = any(width < layout.expert_width for layout in layouts)
        what = f"{f'experts of width {width}' if is_narrow else 'whole experts'} and an output head"
        words = f"with {what}: an ordinary checkpoint that loads without Locum, computes the same"
        save_folder(live, tokenizer, model, out, f"{words} and is {'as large' if is_narrow else 'larger'}")
        bits = dict.fromkeys(name for layout in layouts for name in layout.formats)
        read = f", what was in {' and '.join(bits)} as numbers" if bits else ""
        return f"the stock layout with {what}{read}, for any engine"


def has_stock_layout(model: Path) -> bool:
    return not layouts_of(model) and not is_adapter(model)


def stock_faults(model: Path) -> list[str]:
    """What keeps a checkpoint from ever being stock, in words; empty where whole experts can hold it."""
    shape, layouts = read_shape(model), layouts_of(model)
    faults = []
    counts = sorted({layer.num_experts for layer in shape.layers})
    if len(counts) > 1:
        faults.append(f"unequal numbers of experts ({counts[0]} to {counts[-1]})")
    beyond = {name: beyond_weights(layout) for name, layout in layouts.items()}
    for part in dict.fromkeys(part for parts in beyond.values() for part in parts):
        faults.append(f"{part} ({first_of([name for name, parts in beyond.items() if part in parts])})")
    if fixed := [x.name for x in _stock_layers(model) if not x.stock_can_drop and [x.num_experts] != counts]:
        faults.append(f"a number of experts that the config shares with other layers ({first_of(fixed)})")
    return faults


def _stock_layers(model: Path) -> tuple[LayerShape, ...]:
    """The layers that a checkpoint's config would have without containers."""
    config = read_config(model)
    if is_compressed(config):
        del config.quantization_config
    return tuple(layer.shape for layer in find_layers(skeleton(config)))


def first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def merged_first(model: Path) -> str:
    """Why an export needs an adapter and its base as one checkpoint, and how to write that."""
    here = f"locum export {shlex.quote(str(model))} --to stock --out STOCK"
    return f"it is an adapter, whose other weights are its base's; write both as one checkpoint first: {_in_python(model) if stock_faults(model) else here}"


def _in_python(model: Path) -> str:
    return f"locum.load_model({str(model)!r}).save_pretrained(OUT) in Python, and the tokenizer's files beside it"


def nearest(model: Path) -> str:
    """The plan nearest to a checkpoint's own that a stock layout can hold. An adapter can still be merged into what it is over."""
    if is_adapter(model):
        return f"to write the adapter and its base as one checkpoint that Locum loads: {_in_python(model)}"
    plan, notes = plan_of(model), read_notes(model)
    if plan is None or "original_shape" not in notes:
        return "prune the original to equal numbers of experts instead: locum plan STATISTICS --method prune"
    removed = plan.removed(ModelShape.from_json(notes["original_shape"]))
    if removed <= 0:
        return "it keeps every expert's weights, so the original itself is the nearest that can be held"
    return (
        f"the nearest plan that it can hold drops equally many experts of every layer: locum plan STATISTICS --method "
        f"prune --remove {removed:.2f}"
    )
