"""Train routers and vectors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...checkpoints.patch import vectors_and_routers
from ...plans.plan import Plan
from ..context import Context
from . import Way, way


@way("vectors", source="arXiv 2205.05638 (IA3), on routers and auxiliary experts", learning_rate=1e-4)
@dataclass(frozen=True)
class Vectors(Way):
    """Train the routers and the vectors that auxiliary experts leave behind; every weight stays as it is.

    Trained:  the routers of all MoE layers and the vectors of layers with a routing policy (experts/policies/).
    Loss:     cross entropy of the next token.
    Edges:    the result is its base with other routers and vectors, so `--adapter-only` can write these alone.
    Raises:   OptionError where no layer has a routing policy.
    Source:   the vectors are those of Compressed Experts, arXiv 2503.00634; training them alone is IA3's way,
              arXiv 2205.05638.
    """

    changes_weights: ClassVar[bool] = False
    across_ranks: ClassVar[bool] = True

    def objection(self, plan: Plan | None) -> str | None:
        if any(layer.routing for layer in (plan.layers if plan else ())):
            return None
        return (
            "trains the vectors and routers of layers with a routing policy, and no layer has one "
            "(--method compressed-experts gives them one)"
        )

    def prepare(self, context: Context, start: int) -> None:
        context.model.requires_grad_(False)
        for tensor in vectors_and_routers(context.model).values():
            tensor.requires_grad_(True)
