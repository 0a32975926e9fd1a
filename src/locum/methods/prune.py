"""Dropping experts together with their router rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..budgets.selection import BUDGETS, layer_scores, select_lowest
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("prune", paper="arXiv 2510.13999 (REAP)")
@dataclass(frozen=True)
class Prune:
    """Drop the lowest-scored experts of every layer.

    The router loses their rows, so a softmax over all experts renormalises over those left, and the next-best expert
    is selected in their place: removing an expert that is never selected still changes a model whose gates are not
    renormalised after top-k. Equal counts give an ordinary checkpoint; per-layer counts (`budget="global"`) need Locum
    to load.

    Needs:    what the criterion needs.
    Edges:    never below top-k; equal numbers per group for group-limited routers.
    Source:   REAP, arXiv 2510.13999; per-layer counts by global ranking as in MoNE's model-wide setting (2507.00390).
    """

    score: str = option("reap", "criterion by which experts are ranked")
    budget: str = option("uniform", "the same count in every layer, or all layers ranked together", choices=BUDGETS)

    def needs(self) -> tuple[str, ...]:
        return CRITERIA[self.score].needs

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        return layer_scores(statistics, shape, self.score)

    def plan(self, scored: tuple[Tensor, ...], shape: ModelShape, amount: float) -> list[LayerPlan]:
        taken = select_lowest(scored, shape, amount, self.budget)
        return [
            LayerPlan(layer.name, tuple(DROPPED if e in chosen else KEPT for e in range(layer.num_experts)))
            for layer, chosen in zip(shape.layers, taken, strict=True)
        ]
