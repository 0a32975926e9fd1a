"""MergeMoE: experts are merged so that the outputs of the one that is left are nearest to theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..budgets.groups import groups_left, join_dominant, merged
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import LayerStatistics, Statistics
from . import Weights, method
from .dominant import Dominance, dominance


@method("merge-moe", paper="arXiv 2510.14436 (MergeMoE)")
@dataclass(frozen=True)
class MergeMoE:
    """Merge every expert that is not a centre into the nearest one, and fit what is left to the outputs of its members.

    1. Centres are the experts with the highest scores, the same number in every layer; every other expert joins the centre
       whose weights are nearest, ||W_i - W_j||.
    2. Gate and up of a group: sum_e b_e W_e, b_e = f_e / sum_e f_e.
    3. Its down: min over W of sum over sampled inputs x of ||W h(x) - sum_e b_e f_e(x)||^2, h(x) the hidden state of 2.

    The router is untouched: all members' rows lead to the one expert.

    Needs:    weight_product, softmax_sum, input_sample where it fits, and what the criterion needs.
    Edges:    never-routed experts are centres last and weigh nothing; of equal scores the one with more router probability is
              first. Inputs fewer than hidden units leave W near the mean of the members' down weights: a small ridge pulls it
              there.
    Source:   MergeMoE, arXiv 2510.14436. M-SMoE's merging is the same without step 3 (`fit` off). Differs: the paper takes the
              pseudo-inverse over all calibration tokens, here it is the ridge over a sample of 512; distances are of gate, up and
              down, the paper's of gate and up.
    """

    score: str = option("frequency", "criterion by which experts are centres and weigh")
    fit: bool = option(True, "fit down weights to the members' outputs; without, average them too")
    align: bool = option(False, "match hidden units to the heaviest member's before averaging")

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, "softmax_sum", "weight_product", *(("input_sample",) if self.fit else ()))

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Dominance:
        return dominance(statistics, shape, self.score, nearness)

    def plan(self, scored: Dominance, shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = []
        for layer, scores_E, order, near_EE in zip(shape.layers, *scored, strict=True):
            left = groups_left(layer, amount)
            plan = merged(layer, join_dominant(near_EE, order[:left], order[left:]), scores_E, self.align)
            bases = tuple(replace(base, merge="least-squares") for base in plan.bases)
            plans.append(replace(plan, bases=bases) if self.fit else plan)
        return plans


def nearness(layer: LayerStatistics) -> Tensor:
    """[E, E] minus the squared distance of two experts' weights, each as one long vector. Needs weight_product."""
    square_E = layer["weight_product"].diagonal()
    return 2 * layer["weight_product"] - square_E[:, None] - square_E[None, :]
