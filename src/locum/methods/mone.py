"""MoNE: redundant experts become constants, their mean outputs."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.ranking import Ranking
from ..options import option
from ..plans.plan import KEPT, LayerPlan, stand_in
from ..shapes import ModelShape
from . import method
from .ranked import Ranked


@method("mone", paper="arXiv 2507.00390 (MoNE)")
@dataclass(frozen=True)
class MoNE(Ranked):
    """Replace the least variable, least used experts by their mean output on the calibration tokens.

    The router is untouched; a replaced expert that is selected adds gate * c instead of computing anything.

    Needs:    output_sum, count, what criterion and budget need, and output_peak, by which Super Experts are found.
    Edges:    an expert that no token selected has no mean output and becomes the constant zero. Super Experts stay unless
              told not to.
    Source:   MoNE, arXiv 2507.00390, as in its released code (see the criterion for where code and paper differ).
    """

    score: str = option("mone", "criterion by which experts are ranked; see locum list criteria")

    def needs(self) -> tuple[str, ...]:
        return (*super().needs(), "output_sum", "count")

    def plan(self, scored: Ranking, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(
                layer.name, tuple(stand_in(constant=True) if e in gone else KEPT for e in range(layer.num_experts))
            )
            for layer, gone in zip(shape.layers, self.taken(scored, shape, amount), strict=True)
        ]
