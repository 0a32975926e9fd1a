"""LightMoE: less important experts become shared bases with small adapters.

Letters: E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..budgets.groups import group_by_dominance, group_by_kmeans, routing_likeness
from ..budgets.selection import SELECTIONS, SelectionScores, mass_weights, select, selection_scores
from ..criteria.criterion import CRITERIA
from ..experts.parts.low_rank import STARTS
from ..options import option
from ..plans.plan import KEPT, Base, LayerPlan, stand_in
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics, mean_output
from . import Weights, method

GROUPINGS = ("dominant", "kmeans")


@dataclass(frozen=True, eq=False)
class Scores:
    """What selection and grouping read."""

    ranking: SelectionScores
    alike_L: Sequence[Tensor]  # of every layer, what its experts are grouped by


@method("lightmoe", paper="arXiv 2603.12645 (LightMoE)", published={"start": "gaussian"})
@dataclass(frozen=True)
class LightMoE:
    """Replace the experts that carry little gate mass by M shared bases per layer plus a rank-r adapter each.

    1. Selection (section 3.1, Eq. 2, 3): per layer the shortest prefix of experts, least gate mass first, whose share
       of the mass exceeds a threshold; layers with larger router outputs get a lower one.
    2. Grouping (section 3.2): the M replaced experts with the most mass are dominant; every other one joins the
       dominant expert whose routing logits are most alike (mean over samples of the cosine), or k-means on mean outputs.
    3. Base of a group (Eq. 4): mean of its members' weights, weighted by gate mass.
    4. Start: the adapter that takes the least from what the calibration tokens see, of all of rank r (whitened SVD).
    A replaced expert computes with base + B A; the router is untouched. Recovery anneals the old weights away.

    Needs:    gate_sum, logit_norm, tokens, logit_cosine (or output_sum and count for k-means); input_gram and hidden_gram
              for whitened starts.
    Edges:    a layer in which fewer than two experts would be replaced, or nothing saved, stays whole; with at most M
              replaced experts it gets one base fewer than experts. Members without any gate mass weigh alike.
    Source:   LightMoE, arXiv 2603.12645. Differs: adapters start whitened, where the paper's start at B = 0
              (`--preset paper`); `align` is an option that the paper does not have; rank 0 gives plain merging.
    """

    selection: str = option("adaptive", "how many experts each layer gives up", choices=SELECTIONS)
    score: str = option("gate", "criterion by which experts are ranked")
    alpha: float = option(0.3, "how strongly large router outputs protect a layer", at_least=0, at_most=100)
    clip: float = option(0.2, "largest relative deviation of a layer's threshold", at_least=0)
    grouping: str = option("dominant", "which experts share a base", choices=GROUPINGS)
    bases: int = option(3, "shared bases per layer", at_least=1)
    rank: int = option(16, "rank of every replaced expert's adapter; 0 merges only", at_least=0)
    start: str = option(
        "whitened", "adapters start at zero (gaussian), or from what the base leaves over", choices=STARTS
    )
    align: bool = option(False, "match hidden units to the dominant expert's before averaging")

    def needs(self) -> tuple[str, ...]:
        similarity = ("output_sum", "count") if self.grouping == "kmeans" else ("logit_cosine", "samples")
        return (
            *CRITERIA[self.score].needs,
            "logit_norm",
            "tokens",
            *similarity,
            *(STARTS[self.start].needs if self.rank else ()),
        )

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        alike = routing_likeness if self.grouping == "dominant" else mean_output
        alike_L = tuple(alike(statistics.layer(layer.name)) for layer in shape.layers)
        return Scores(selection_scores(statistics, shape, self.score), alike_L)

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        how = {"selection": self.selection, "alpha": self.alpha, "clip": self.clip}
        selected = select(scored.ranking, shape, amount, **how)
        layers = zip(shape.layers, scored.alike_L, selected, scored.ranking.scores_LE, strict=True)
        return [self._layer(*layer) for layer in layers]

    def _layer(self, shape: LayerShape, alike: Tensor, candidates: list[int], scores_E: Tensor) -> LayerPlan:
        whole = LayerPlan(shape.name, (KEPT,) * shape.num_experts)
        num_bases = min(self.bases, len(candidates) - 1)
        if num_bases < 1:
            return whole
        group = group_by_dominance if self.grouping == "dominant" else group_by_kmeans
        groups = [sorted(members) for members in group(alike, candidates, scores_E, num_bases) if members]
        rank = min(self.rank, shape.hidden_size, shape.expert_width)
        start = self.start if rank else "gaussian"
        slots = [KEPT] * shape.num_experts
        for b, members in enumerate(groups):
            for e in members:
                slots[e] = stand_in(base=b, rank=rank, start=start)
        bases = tuple(Base(tuple(m), mass_weights(scores_E, m), self.align) for m in groups)
        plan = LayerPlan(shape.name, tuple(slots), bases)
        return plan if plan.parameters(shape) < whole.parameters(shape) else whole
