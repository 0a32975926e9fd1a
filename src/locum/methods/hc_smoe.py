"""HC-SMoE: experts whose outputs are alike are merged, by hierarchical clustering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets.clusters import LINKAGES, Tree, tree
from ..budgets.groups import groups_left, merged
from ..budgets.ranking import layer_scores
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import LayerStatistics, Statistics, mean_output
from . import Weights, method


def _all_tokens(layer: LayerStatistics) -> Tensor:
    """[E, D] mean output over all tokens."""
    return layer["every_output_sum"] / layer["tokens"].clamp(min=1)


MEANS = {
    "routed": (("output_sum", "count"), mean_output),
    "all": (("every_output_sum", "tokens", "count"), _all_tokens),
}


@dataclass(frozen=True, eq=False)
class Scores:
    """What every layer's experts weigh, and the order in which clusters of them join."""

    scores_LE: Sequence[Tensor]
    tree_L: Sequence[Tree]


@method("hc-smoe", paper="arXiv 2410.08589 (HC-SMoE)", published={"over": "all"})
@dataclass(frozen=True)
class HCSMoE:
    """Join the two nearest clusters of a layer's experts until few enough are left, and merge each into one expert.

    An expert is its mean output o_e; two clusters are as far apart as their members' o_e are on average (Euclidean). A
    cluster becomes sum_e f_e W_e / sum_e f_e, and every layer keeps the same share. The router is untouched: all members'
    rows lead to the one expert.

    Needs:    output_sum, count, and what the criterion needs; with `over="all"` every_output_sum and tokens in place of output_sum
              (every expert runs on every token).
    Edges:    experts that were never selected join first, each the one that is nearest, and weigh nothing.
    Source:   HC-SMoE, arXiv 2410.08589. Differs: by default o_e is the mean over the tokens that selected the expert, which needs
              no further work; `over="all"` (`--preset paper`) is the paper's, over all tokens. Its released scripts name the
              clustering wrongly and run k-means from random starts instead.
    """

    score: str = option("frequency", "criterion by which members weigh")
    linkage: str = option("average", "how far apart two clusters are, of all pairs of members", choices=LINKAGES)
    over: str = option(
        "routed", "over which tokens an expert's mean output is: those that selected it, or all", choices=MEANS
    )
    align: bool = option(False, "match hidden units to the heaviest member's before averaging")

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, *MEANS[self.over][0])

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        layers, mean = [statistics.layer(layer.name) for layer in shape.layers], MEANS[self.over][1]
        trees = tuple(tree(_apart(mean(layer)), layer["count"], self.linkage) for layer in layers)
        return Scores(layer_scores(statistics, shape, self.score), trees)

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            merged(layer, joined.groups(groups_left(layer, amount)), scores_E, self.align)
            for layer, scores_E, joined in zip(shape.layers, scored.scores_LE, scored.tree_L, strict=True)
        ]


def _apart(mean_ED: Tensor) -> Tensor:
    """[E, E] Euclidean distances."""
    return torch.cdist(mean_ED, mean_ED, compute_mode="donot_use_mm_for_euclid_dist")
