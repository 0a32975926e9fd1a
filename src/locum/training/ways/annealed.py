"""Train adapters while the old weights of replaced experts fade out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...errors import OptionError
from ...files import fingerprint
from ...options import option
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
from ..layer import keep_old, set_beta
from ..states import sample
from . import Way, way

EXHAUSTED = 1e-9  # a beta that only rounding keeps above zero


def linear(tau: float, steepness: float) -> float:
    """1 - tau (LightMoE Eq. 7)."""
    return 1 - tau


def exponential(tau: float, steepness: float) -> float:
    """(exp(-g tau) - exp(-g)) / (1 - exp(-g)) for steepness g (LightMoE Eq. 9): from 1 to 0, most of the way early."""
    return (math.exp(-steepness * tau) - math.exp(-steepness)) / (1 - math.exp(-steepness))


ANNEALING: dict[str, Callable[[float, float], float]] = {"linear": linear, "exponential": exponential}


def beta_at(step: int, steps: int, end_fraction: float, annealing: str = "linear", steepness: float = 3.0) -> float:
    """The share of the old weights before step `step` of `steps`; 0 from step end_fraction * steps on."""
    end = end_fraction * steps
    if step >= end - EXHAUSTED:
        return 0.0
    return max(ANNEALING[annealing](step / end, steepness), 0.0)


@way("annealed", source="arXiv 2603.12645 (LightMoE), section 3.3")
@dataclass(frozen=True)
class Annealed(Way):
    """Train adapters, shared bases and constants while the old weights of replaced experts fade out.

        W(beta) = beta W_old + (1 - beta) W_base + B A,   beta from 1 to 0 in the first `end_fraction` of the steps

    Trained:  a low-rank adapter on every expert, a policy's vectors, and with `train_bases` shared bases and constants.
    Loss:     cross entropy of the next token.
    Needs:    the original's replaced experts, unless `end_fraction` is 0.
    Edges:    the model computes what the original computes before the first step, whatever the stand-ins start from.
    Raises:   OptionError where the plan replaces no expert, or for a rank above the smaller side of a layer's experts.
    Source:   LightMoE, arXiv 2603.12645, section 3.3, Eq. 6 to 9. Differs: stand-ins that do not start at B = 0 have
              their first product taken off W_old (training/layer.py).
    """

    across_ranks: ClassVar[bool] = True
    experts_alone: ClassVar[bool] = True
    layer_by_layer: ClassVar[bool] = True
    rank: int = rank_option()
    train_bases: bool = train_bases_option()
    keep_size: bool = keep_size_option()
    end_fraction: float = option(
        0.2, "fraction of the steps after which the old weights are gone; 0 needs no original", at_least=0, at_most=1
    )
    annealing: str = option("linear", "how the old weights fade out", choices=ANNEALING)
    steepness: float = option(3.0, "of exponential annealing; the paper tried 1, 3 and 5", above=0)

    def objection(self, plan: Plan | None) -> str | None:
        if _replaced(plan):
            return None
        what = "a model without a plan has" if plan is None else f"the plan ({plan.method}) leaves"
        return f"fades out the old weights of replaced experts, and {what} none"

    def needs_original(self, plan: Plan | None) -> bool:
        return self.end_fraction > 0

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        return with_adapters(plan, layers, self)

    def check(self, context: Context) -> None:
        check_adapters(context, self)
        if not self.needs_original(context.plan):
            return
        missing = [name for name in _replaced(context.plan) if name not in context.original.read]
        if missing:
            raise OptionError(
                f"the original lacks {len(missing)} layers whose experts were replaced (first: {missing[0]}); give the "
                f"model that this one was compressed from with --original, or set --end-fraction 0 to do without"
            )

    def identity(self, context: Context) -> dict[str, str]:
        if not self.needs_original(context.plan):
            return {}
        parts = []
        for name, experts in _replaced(context.plan).items():
            expert = context.original.read[name](experts[0])
            parts += [sample(tensor) for tensor in vars(expert).values() if tensor is not None]
        return {"original": fingerprint(*parts)}

    def prepare(self, context: Context, start: int) -> None:
        open_adapters(context, self)
        if self._beta(context, start) > 0:
            for layer in context.layers:
                if layer.plan.fading:
                    keep_old(layer, context.original.read[layer.name], context.workdir)

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        beta = self._beta(context, step)
        for layer in context.layers:
            set_beta(layer, beta)
        return {"beta": beta}

    def is_result(self, context: Context, step: int) -> bool:
        return self._beta(context, step) == 0

    def _beta(self, context: Context, step: int) -> float:
        return beta_at(step, context.steps, self.end_fraction, self.annealing, self.steepness)


def _replaced(plan: Plan | None) -> dict[str, tuple[int, ...]]:
    """The experts of every layer whose old weights can fade out."""
    return {layer.layer: layer.fading for layer in (plan.layers if plan else ()) if layer.fading}
