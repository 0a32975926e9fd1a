"""HC-SMoE: experts whose outputs are alike are merged, by hierarchical clustering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from ..budgets.groups import merged
from ..budgets.ranking import layer_scores
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics, mean_output
from . import Weights, method

LINKAGES = ("average", "single", "complete")


@dataclass(frozen=True, eq=False)
class Scores:
    """What every layer's experts weigh, and the order in which clusters of them join (scipy's linkage matrix)."""

    scores_LE: Sequence[Tensor]
    tree_L: Sequence[np.ndarray]


@method("hc-smoe", paper="arXiv 2410.08589 (HC-SMoE)")
@dataclass(frozen=True)
class HCSMoE:
    """Join the two nearest clusters of a layer's experts until few enough are left, and merge each into one expert.

    An expert is its mean output o_e; two clusters are as far apart as their members' o_e are on average (Euclidean). A
    cluster becomes sum_e f_e W_e / sum_e f_e, and every layer keeps the same share. The router is untouched: all members'
    rows lead to the one expert.

    Needs:    output_sum, count, and what the criterion needs.
    Edges:    experts that were never selected have the mean output zero; they join first, and weigh nothing.
    Source:   HC-SMoE, arXiv 2410.08589. Differs: o_e is the mean over the tokens that selected the expert, where the
              paper runs every expert on every token. Its released scripts name the clustering wrongly and run k-means
              from random starts instead.
    """

    score: str = option("frequency", "criterion by which members weigh")
    linkage: str = option("average", "how far apart two clusters are, of all pairs of members", choices=LINKAGES)
    align: bool = option(False, "match hidden units to the heaviest member's before averaging")

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, "output_sum", "count")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        means = (mean_output(statistics.layer(layer.name)).numpy() for layer in shape.layers)
        return Scores(layer_scores(statistics, shape, self.score), tuple(linkage(x, self.linkage) for x in means))

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = []
        for layer, scores_E, tree in zip(shape.layers, scored.scores_LE, scored.tree_L, strict=True):
            left = layer.num_experts - int(amount * (layer.num_experts - 1) + 1e-9)
            label_E = cut_tree(tree, n_clusters=left)[:, 0].tolist()
            groups = [[e for e, label in enumerate(label_E) if label == group] for group in range(left)]
            plans.append(merged(layer, groups, scores_E, self.align))
        return plans
