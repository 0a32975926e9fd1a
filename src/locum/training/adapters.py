"""Adapters on every expert: what the ways to recover that train them share.

Weights in few bits are frozen: their bytes stay what they are. An adapter on weights that are numbers is merged into them at the
end. One on weights in few bits stays beside them, in the dtype of the checkpoint, and the plan of the result says so; an adapter that
the plan has in few bits is trained as it is written (rounding.py), and goes back into its format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from ..checkpoints.placing import note_layouts
from ..errors import OptionError
from ..experts.parts.low_rank import LowRank
from ..experts.parts.own_weights import OwnWeights
from ..models.families import MoeLayer, find_layers
from ..options import option
from ..plans.layer_plan import LayerPlan, Slot
from ..plans.plan import Plan
from ..shapes import LayerShape
from .context import Context, check_layers
from .layer import close_layer, open_layer

DEFAULT_RANK = 16


class Adapting(Protocol):
    """A way that trains adapters, by its options."""

    name: str
    rank: int
    train_bases: bool
    keep_size: bool


def rank_option() -> Any:
    """The field of a way's options that says how large new adapters are."""
    return option(0, "rank of the adapters of kept experts; 0: that of the plan's stand-ins, else 16", at_least=0)


def train_bases_option() -> Any:
    """The field of a way's options that says whether more than adapters is trained."""
    return option(True, "train shared bases and constants too, not adapters alone")


def keep_size_option() -> Any:
    """The field of a way's options that says whether adapters stay where they cannot be merged."""
    return option(
        False,
        "add no adapter to weights in few bits, beside which it would stay: the result is as large as its plan says",
    )


def check_adapters(context: Context, way: Adapting) -> None:
    """Refuse a plan of another model, a rank that is too large for a layer, and what leaves nothing to train. Raises PlanError,
    OptionError."""
    check_layers(context)
    for layer in find_layers(context.model):
        adapter_rank(way.rank, context.plan, layer.shape)
    if way.keep_size and not any(_has_trainable(layer, way.train_bases) for layer in find_layers(context.model)):
        raise OptionError(
            f"--how {way.name} would train nothing: all experts are in few bits ({', '.join(context.plan.formats)}) and none has "
            f"an adapter; leave --keep-size out, and they get adapters that stay"
        )


def _has_trainable(layer: MoeLayer, train_bases: bool) -> bool:
    """Whether anything of a layer is trained without adapters that stay."""
    layout = getattr(layer.experts, "layout", None)
    if layout is None or (layout.routing is not None and layout.routing.tensors(layout)):
        return True
    trained = ("always", "with bases") if train_bases else ("always",)
    own = any(stack.part == OwnWeights.name and not stack.format for stack in layout.stacks)
    return own or any(
        stack.kind.trains in trained and (not stack.format or stack.part == LowRank.name) for stack in layout.stacks
    )


def adapter_rank(rank: int, plan: Plan | None, shape: LayerShape) -> int:
    """The rank of new adapters: as asked for, else the one most stand-ins of the plan have, else 16 (or what fits)."""
    limit = min(shape.hidden_size, shape.expert_width)
    if rank > limit:
        raise OptionError(
            f"--rank is {rank}; allowed: at most {limit}, the smaller side of the experts' weights in {shape.name}"
        )
    slots = [slot for layer_plan in (plan.layers if plan else ()) for slot in layer_plan.slots]
    ranks = Counter(part.rank for slot in slots for part in slot.parts if isinstance(part, LowRank))
    usual = max(ranks, key=lambda r: (ranks[r], r), default=DEFAULT_RANK)
    return rank or min(usual, limit)


def with_adapters(plan: Plan | None, shapes: Iterable[LayerShape], way: Adapting) -> Plan | None:
    """The plan of what such a way makes of what a plan made: experts with whole weights in few bits and no adapter have one more."""
    if plan is None or way.keep_size or not plan.formats:
        return plan
    of = {shape.name: adapter_rank(way.rank, plan, shape) for shape in shapes}
    layers = tuple(_adapted(layer, of[layer.layer]) if layer.layer in of else layer for layer in plan.layers)
    return plan if layers == plan.layers else replace(plan, layers=layers)


def _adapted(plan: LayerPlan, rank: int) -> LayerPlan:
    def slot(slot: Slot) -> Slot:
        place = next((i for i, part in enumerate(slot.parts) if part.is_whole and part.format), None)
        if place is None or any(isinstance(part, LowRank) for part in slot.parts):
            return slot
        return replace(slot, parts=(*slot.parts[: place + 1], LowRank(rank), *slot.parts[place + 1 :]))

    return replace(plan, slots=tuple(map(slot, plan.slots)))


def open_adapters(context: Context, way: Adapting) -> None:
    """Open every layer with an adapter on every expert. Adapters and a policy's vectors become trainable, all other
    weights frozen, except shared bases and constants with `train_bases`."""
    context.model.requires_grad_(False)
    for index, layer in enumerate(find_layers(context.model)):
        open_adapter(context, index, layer, way)


def open_adapter(context: Context, index: int, layer: MoeLayer, way: Adapting) -> None:
    """The same for one MoE layer, number `index` of the model."""
    name, new_rank = layer.shape.name, adapter_rank(way.rank, context.plan, layer.shape)
    grown = with_adapters(context.plan, [layer.shape], way)
    # Far from the seeds that `apply` draws the stand-ins' adapters from.
    seed = (1 << 40) + context.seed * 1_000_003 + index
    becomes = None if grown is None else grown.layer(name)
    opened = open_layer(context.model, layer, context.layer_plan(name), new_rank, way.train_bases, seed, becomes)
    for parameter in opened.container.trainable(way.train_bases):
        parameter.requires_grad_(True)
    context.layers.append(opened)


def close_adapters(context: Context) -> None:
    """Merge the adapters of kept experts and give every layer the layout that it came with, or that of the plan with the adapters
    that stay, which the config then says."""
    while context.layers:
        close_layer(context.model, context.layers.pop())
    note_layouts(context.model)
