"""Sub-MoE: experts whose outputs point the same way are merged in the subspace that they span together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..budgets.groups import LIKENESS
from ..stats.sums import LayerStatistics
from . import method
from .clustered import Clustered


@method("sub-moe", paper="arXiv 2506.23266 (Sub-MoE)", published={"align": False})
@dataclass(frozen=True)
class SubMoE(Clustered):
    """Join the clusters of a layer's experts whose outputs are most alike, and merge each in the union of its members' subspaces.

    [W_1 ... W_n] = U S [V_1 ... V_n]^T,  W = U S (sum_e f_e V_e / sum_e f_e)^T

    Two experts are as far apart as 1 - mean over all tokens of cos(f_i(x), f_j(x)). With every direction of U kept, as in the
    paper's merging, W is sum_e f_e W_e / sum_e f_e exactly (U S V_e^T is W_e), so that is what is built, hidden units matched to the
    heaviest member's first. Every layer keeps the same share. The router is untouched: all members' rows lead to the one expert.

    Needs:    output_cosine, tokens, count (every expert runs on every token), and what the criterion needs.
    Edges:    experts that were never selected join first, each the one that is most like it, and weigh nothing. How much experts
              are used says nothing of who joins: where none are alike, busy ones join, and that costs more than random pruning.
    Source:   Sub-MoE, arXiv 2506.23266. Differs: clusters are joined one after the other by mean distance, where the paper runs
              k-means from random starts, over pairs of layers together so that layers keep different numbers; hidden units
              are matched, as M-SMoE's (`--preset paper`: they are not); its Sub-MoE+, which cuts directions of what was merged, is
              left out.
    """

    def reads(self) -> tuple[str, ...]:
        return LIKENESS["outputs"].needs

    def distances(self, layer: LayerStatistics) -> Tensor:
        return (1 - LIKENESS["outputs"].of(layer)).clamp(min=0)
