"""Dropping experts together with their router rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.ranking import Ranking
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import ModelShape
from . import method
from .ranked import Ranked


@method("prune", paper="arXiv 2510.13999 (REAP)")
@dataclass(frozen=True)
class Prune(Ranked):
    """Drop the lowest-scored experts of every layer.

    The router loses their rows, so a softmax over all experts renormalises over those left, and the next-best expert
    is selected in their place: removing an expert that is never selected still changes a model whose gates are not
    renormalised after top-k. Equal counts (`budget="uniform"`) give an ordinary checkpoint; per-layer counts need Locum
    to load.

    Needs:    what the criterion and the budget need, and output_peak, by which Super Experts are found.
    Edges:    never below top-k; equal numbers per group for group-limited routers; Super Experts stay unless told not to.
    Source:   REAP, arXiv 2510.13999; per-layer counts by global ranking as in MoNE's model-wide setting (2507.00390).
    """

    def plan(self, scored: Ranking, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(layer.name, tuple(DROPPED if e in chosen else KEPT for e in range(layer.num_experts)))
            for layer, chosen in zip(shape.layers, self.taken(scored, shape, amount), strict=True)
        ]
