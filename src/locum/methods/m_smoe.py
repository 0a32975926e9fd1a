"""M-SMoE: experts that are seldom selected are merged into those that are routed like them."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.groups import join_dominant, merged, routing_likeness
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method
from .dominant import Dominance, dominance

BUDGETS = ("uniform", "global")


@method("m-smoe", paper="arXiv 2310.01334 (M-SMoE)")
@dataclass(frozen=True)
class MSMoE:
    """Merge every expert that is not dominant into the dominant expert of its layer that is routed most like it.

    1. Dominant are the experts with the highest share of their layer's largest score, over all layers together; the best
       of each layer always is. So layers keep different numbers.
    2. Every other expert joins the dominant one whose routing logits are most alike (mean over samples of the cosine).
    3. A group becomes one expert: sum_e f_e W_e / sum_e f_e, the hidden units matched to its heaviest member's first.

    The router is untouched: all members' rows lead to the one expert.

    Needs:    logit_cosine, samples, softmax_sum, and what the criterion needs.
    Edges:    experts that were never selected are never dominant while another could be, and weigh nothing; of equal
              scores the one with more router probability counts as higher.
    Source:   M-SMoE of MC-SMoE, arXiv 2310.01334, without its second step, which decomposes what was merged. Differs: the
              code takes the cosine over a whole batch, and matches hidden units for T5 alone; `align` does for all.
    """

    score: str = option("frequency", "criterion by which experts are dominant and weigh")
    budget: str = option("global", "the same count in every layer, or all layers ranked together", choices=BUDGETS)
    align: bool = option(True, "match hidden units to the heaviest member's before averaging")

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, "logit_cosine", "samples", "softmax_sum")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Dominance:
        return dominance(statistics, shape, self.score, routing_likeness)

    def plan(self, scored: Dominance, shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = []
        counts = self._counts(scored, shape, amount)
        for layer, scores_E, order, alike_EE, count in zip(shape.layers, *scored, counts, strict=True):
            groups = join_dominant(alike_EE, order[: len(order) - count], order[len(order) - count :])
            plans.append(merged(layer, groups, scores_E, self.align))
        return plans

    def _counts(self, scored: Dominance, shape: ModelShape, amount: float) -> list[int]:
        """Experts of every layer that are merged into others."""
        most = [layer.num_experts - 1 for layer in shape.layers]
        if self.budget == "uniform":
            return [int(amount * count + 1e-9) for count in most]
        shares = []  # of every expert but the best of its layer, which stays
        for index, (scores_E, order) in enumerate(zip(scored.scores_LE, scored.ranked_L, strict=True)):
            shares += [(float(scores_E[e] / scores_E.max().clamp(min=1e-300)), index) for e in order[1:]]
        gone = [index for _, index in sorted(shares)[: int(amount * sum(most) + 1e-9)]]
        return [gone.count(index) for index in range(len(most))]
