"""MoNE: redundant experts become constants, their mean outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..budgets.selection import BUDGETS, layer_scores, select_lowest
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import KEPT, LayerPlan, stand_in
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("mone", paper="arXiv 2507.00390 (MoNE)")
@dataclass(frozen=True)
class MoNE:
    """Replace the least variable, least used experts by their mean output on the calibration tokens.

    The router is untouched; a replaced expert that is selected adds gate * c instead of computing anything.

    Needs:    output_sum, count and what the criterion needs.
    Edges:    an expert that no token selected has no mean output and becomes the constant zero.
    Source:   MoNE, arXiv 2507.00390, as in its released code (see the criterion for where code and paper differ).
    """

    score: str = option("mone", "criterion by which experts are ranked")
    budget: str = option("uniform", "the same count in every layer, or all layers ranked together", choices=BUDGETS)

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, "output_sum", "count")

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        return layer_scores(statistics, shape, self.score)

    def plan(self, scored: tuple[Tensor, ...], shape: ModelShape, amount: float) -> list[LayerPlan]:
        taken = select_lowest(scored, shape, amount, self.budget)
        return [
            LayerPlan(
                layer.name,
                tuple(stand_in(constant=True) if e in chosen else KEPT for e in range(layer.num_experts)),
            )
            for layer, chosen in zip(shape.layers, taken, strict=True)
        ]
