"""Dropping experts together with their router rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import global_counts, lowest, uniform_counts
from ..criteria import CRITERIA
from ..options import option
from ..plan import DROPPED, KEPT, LayerPlan
from ..shapes import ModelShape
from ..statistics import Statistics
from . import method


@method("prune", paper="arXiv 2510.13999 (REAP) and the papers of its criteria")
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
    budget: str = option(
        "uniform", "the same count in every layer, or all layers ranked together", choices=("uniform", "global")
    )

    def needs(self) -> tuple[str, ...]:
        return CRITERIA[self.score].needs

    def plan(self, statistics: Statistics, shape: ModelShape, amount: float) -> list[LayerPlan]:
        scores_LE = [CRITERIA[self.score](statistics.layer(layer.name)) for layer in shape.layers]
        uniform = self.budget == "uniform"
        counts = uniform_counts(shape, amount) if uniform else global_counts(scores_LE, shape, amount)
        plans = []
        for layer, scores_E, count in zip(shape.layers, scores_LE, counts, strict=True):
            dropped = set(lowest(scores_E, count, layer.num_groups))
            slots = tuple(DROPPED if e in dropped else KEPT for e in range(layer.num_experts))
            plans.append(LayerPlan(layer.name, slots))
        return plans
