"""Sub-MoE: experts whose outputs point the same way are merged in the subspace that they span together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..budgets.clusters import LINKAGES, Tree, tree
from ..budgets.groups import LIKENESS, groups_left, merged
from ..budgets.ranking import layer_scores
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


class Scores(NamedTuple):
    """What every layer's experts weigh, and the order in which clusters of them join."""

    scores_LE: Sequence[Tensor]
    tree_L: Sequence[Tree]


@method("sub-moe", paper="arXiv 2506.23266 (Sub-MoE)")
@dataclass(frozen=True)
class SubMoE:
    """Join the clusters of a layer's experts whose outputs are most alike, and merge each in the union of its members' subspaces.

    [W_1 ... W_n] = U S [V_1 ... V_n]^T,  W = U S (sum_e f_e V_e / sum_e f_e)^T

    Two experts are as far apart as 1 - mean over all tokens of cos(f_i(x), f_j(x)). With every direction of U kept, as in the
    paper's merging, W is sum_e f_e W_e / sum_e f_e exactly (U S V_e^T is W_e), so that is what is built. Every layer keeps the
    same share. The router is untouched: all members' rows lead to the one expert.

    Needs:    output_cosine, tokens, count (every expert runs on every token), and what the criterion needs.
    Edges:    experts that were never selected join first, each the one that is most like it, and weigh nothing.
    Source:   Sub-MoE, arXiv 2506.23266. Differs: clusters are joined one after the other by mean distance, where the paper runs
              k-means from random starts, over pairs of layers together so that layers keep different numbers; its Sub-MoE+,
              which cuts directions of what was merged, is left out.
    """

    score: str = option("frequency", "criterion by which members weigh")
    linkage: str = option("average", "how far apart two clusters are, of all pairs of members", choices=LINKAGES)
    align: bool = option(False, "match hidden units to the heaviest member's before averaging")

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, *LIKENESS["outputs"].needs, "count")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        trees = tuple(tree(1 - LIKENESS["outputs"].of(layer), layer["count"], self.linkage) for layer in layers)
        return Scores(layer_scores(statistics, shape, self.score), trees)

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            merged(layer, joined.groups(groups_left(layer, amount)), scores_E, self.align)
            for layer, scores_E, joined in zip(shape.layers, *scored, strict=True)
        ]
