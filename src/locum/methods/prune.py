"""Dropping experts together with their router rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..budgets.ranking import Ranking, ranking
from ..options import option
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method
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
    Edges:    never below top-k, unless the router may select fewer (`--lower-top-k`): then as few as the smallest layer has, in all
              layers. Where one is left, a softmax gives it a weight of 1: the layer is dense. Equal numbers per group for
              group-limited routers, whose top-k stays; Super Experts stay unless told not to.
    Source:   REAP, arXiv 2510.13999; per-layer counts by global ranking as in MoNE's model-wide setting (2507.00390); down to one
              expert of each layer as in TSEP (2206.00277).
    """

    lower_top_k: bool = option(
        False, "let layers keep fewer experts than their routers select, which then select fewer"
    )

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Ranking:
        return ranking(statistics, self._open(shape), self.score, self.protect, self.floor)

    def plan(self, scored: Ranking, shape: ModelShape, amount: float) -> list[LayerPlan]:
        taken = self.taken(scored, self._open(shape), amount)
        fewest = min(layer.num_experts - len(chosen) for layer, chosen in zip(shape.layers, taken, strict=True))
        return [
            LayerPlan(
                layer.name,
                tuple(DROPPED if e in chosen else KEPT for e in range(layer.num_experts)),
                top_k=fewest if fewest < layer.top_k else None,
            )
            for layer, chosen in zip(shape.layers, taken, strict=True)
        ]

    def _open(self, shape: ModelShape) -> ModelShape:
        """The shape whose routers need no more experts than they have to."""
        return replace(shape, layers=tuple(map(_one_of, shape.layers))) if self.lower_top_k else shape


def _one_of(layer: LayerShape) -> LayerShape:
    return layer if layer.num_groups > 1 else replace(layer, top_k=1)
