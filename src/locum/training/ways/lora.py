"""Train an adapter on every expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...plans.plan import Plan
from ...shapes import LayerShape
from ..adapters import (
    check_adapters,
    keep_size_option,
    open_adapters,
    rank_option,
    train_bases_option,
    with_adapters,
)
from ..context import Context
from . import Way, way


@way("lora", source="arXiv 2106.09685 (LoRA), on every expert")
@dataclass(frozen=True)
class Lora(Way):
    """Train a low-rank adapter on every expert, shared bases and constants.

        W = W_0 + B A,   A ~ N(0, 1 / columns), B = 0 at the start, both trained; W_0 of a kept expert is frozen

    Trained:  the adapters of the plan's stand-ins, a new one on every other expert, a policy's vectors, and with
              `train_bases` shared bases and constants. Kept experts, routers and all else are frozen.
    Loss:     cross entropy of the next token.
    Edges:    a kept expert's adapter is merged into its weights at the end; a stock model stays stock. Weights in few bits keep
              their bytes: adapters on them stay, in the dtype of the checkpoint, and the plan says so; with `keep_size` they get
              none. Adapters that the plan has in few bits are trained as they are written, rounded to the nearest levels.
    Raises:   OptionError for a rank above the smaller side of a layer's experts.
    Source:   LoRA, arXiv 2106.09685; over weights in few bits QLoRA, arXiv 2305.14314. Differs: adapters sit on experts only, and
              their product is not scaled (alpha = r).
    """

    across_ranks: ClassVar[bool] = True
    rank: int = rank_option()
    train_bases: bool = train_bases_option()
    keep_size: bool = keep_size_option()

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        return with_adapters(plan, layers, self)

    def check(self, context: Context) -> None:
        check_adapters(context, self)

    def prepare(self, context: Context, start: int) -> None:
        open_adapters(context, self)
