"""Adapters on every expert: what the ways to recover that train them share."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import OptionError
from ..experts.parts.low_rank import LowRank
from ..models.families import MoeLayer, find_layers
from ..options import option
from ..plans.plan import Plan
from .context import Context, check_layers
from .layer import close_layer, open_layer

DEFAULT_RANK = 16


def rank_option() -> Any:
    """The field of a way's options that says how large new adapters are."""
    return option(0, "rank of the adapters of kept experts; 0: that of the plan's stand-ins, else 16", at_least=0)


def train_bases_option() -> Any:
    """The field of a way's options that says whether more than adapters is trained."""
    return option(True, "train shared bases and constants too, not adapters alone")


def check_adapters(context: Context, rank: int) -> None:
    """Refuse a plan of another model, and a rank that is too large for a layer. Raises PlanError, OptionError."""
    check_layers(context)
    for layer in find_layers(context.model):
        adapter_rank(rank, context.plan, layer)


def adapter_rank(rank: int, plan: Plan | None, layer: MoeLayer) -> int:
    """The rank of new adapters: as asked for, else the one most stand-ins of the plan have, else 16 (or what fits)."""
    limit = min(layer.shape.hidden_size, layer.shape.expert_width)
    if rank > limit:
        raise OptionError(
            f"--rank is {rank}; allowed: at most {limit}, the smaller side of the experts' weights in "
            f"{layer.shape.name}"
        )
    slots = [slot for layer_plan in (plan.layers if plan else ()) for slot in layer_plan.slots]
    ranks = Counter(part.rank for slot in slots for part in slot.parts if isinstance(part, LowRank))
    usual = max(ranks, key=lambda r: (ranks[r], r), default=DEFAULT_RANK)
    return rank or min(usual, limit)


def open_adapters(context: Context, rank: int, train_bases: bool) -> None:
    """Open every layer with an adapter on every expert. Adapters and a policy's vectors become trainable, all other
    weights frozen, except shared bases and constants with `train_bases`."""
    context.model.requires_grad_(False)
    for index, layer in enumerate(find_layers(context.model)):
        open_adapter(context, index, layer, rank, train_bases)


def open_adapter(context: Context, index: int, layer: MoeLayer, rank: int, train_bases: bool) -> None:
    """The same for one MoE layer, number `index` of the model."""
    plan, new_rank = context.layer_plan(layer.shape.name), adapter_rank(rank, context.plan, layer)
    # Far from the seeds that `apply` draws the stand-ins' adapters from.
    seed = (1 << 40) + context.seed * 1_000_003 + index
    opened = open_layer(context.model, layer, plan, new_rank, train_bases, seed)
    for parameter in opened.container.trainable(train_bases):
        parameter.requires_grad_(True)
    context.layers.append(opened)


def close_adapters(context: Context) -> None:
    """Merge the adapters of kept experts and give every layer the layout that it came with."""
    while context.layers:
        close_layer(context.model, context.layers.pop())
