"""What methods share whose search finds a best set of every number of a layer's experts: plans of any size drop those."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..budgets.counts import uniform_counts
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights


class FoundSets:
    """Plans of `best_sets`: the same share of what was tried, from every layer."""

    def needs(self) -> tuple[str, ...]:
        return ("best_sets",)

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        return tuple(statistics.layer(layer.name)["best_sets"] for layer in shape.layers)

    def plan(self, scored: Sequence[Tensor], shape: ModelShape, amount: float) -> list[LayerPlan]:
        most_L = [int(best_XE.sum(dim=1).max()) for best_XE in scored]
        counts = uniform_counts(shape, amount, most_L)
        return [
            LayerPlan(layer.name, tuple(DROPPED if gone else KEPT for gone in _gone(best_XE, count)))
            for layer, best_XE, count in zip(shape.layers, scored, counts, strict=True)
        ]


def _gone(best_XE: Tensor, count: int) -> list[bool]:
    return best_XE[count - 1].bool().tolist() if count else [False] * best_XE.shape[1]
