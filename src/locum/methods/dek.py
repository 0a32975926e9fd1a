"""DEK: experts that know the same are merged, by how alike their weights are, or what they make of the same tokens (CKA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets.groups import weight_likeness
from ..options import option
from ..stats.sums import LayerStatistics
from . import method
from .clustered import Clustered


def similarity(layer: LayerStatistics) -> Tensor:
    """[E, E] linear CKA of two experts' outputs, at most 1. Needs output_hsic. Experts without any spread are like none."""
    spread_E = layer["output_hsic"].diagonal().clamp(min=0).sqrt()
    scale_E = torch.where(spread_E > 0, spread_E, torch.inf)
    return (layer["output_hsic"] / scale_E[:, None] / scale_E[None, :]).clamp(-1, 1)


KNOWLEDGE = {"outputs": (("output_hsic",), similarity), "weights": (("weight_product",), weight_likeness)}


@method("dek", paper="arXiv 2407.09590 (DEK)", published={"alike": "outputs", "align": False})
@dataclass(frozen=True)
class DEK(Clustered):
    """Group a layer's experts so that members of a group know the same, and merge each group into one expert.

    cos(W_i, W_j), an expert's weights as one long vector; with `alike="outputs"` instead
    CKA(i, j) = HSIC(F_i, F_j) / sqrt(HSIC(F_i, F_i) HSIC(F_j, F_j)),  F_e what expert e makes of all tokens

    Two experts are 1 less that apart; the nearest clusters join until few enough are left, the same number in every layer. A group
    becomes sum_e f_e W_e / sum_e f_e, hidden units matched to its heaviest member's first. CKA does not see how an expert's outputs
    are scaled, turned or shifted, so experts that say the same in other directions count as alike too.
    The router is untouched: all members' rows lead to the one expert.

    Needs:    weight_product, or output_hsic (every expert runs on every token), count, and what the criterion needs.
    Edges:    experts that were never selected join first, each the one that is most like it, and weigh nothing. How much experts
              are used says nothing of who joins: where none are alike, CKA joins busy ones, and that costs more than random pruning.
    Source:   DEK, arXiv 2407.09590, whose method section could not be read: two stages, feature space by outputs or weights, and
              merging are its; CKA's estimate, joining clusters one after the other and the weights in a group are reconstructed.
              Differs: weights are the default, and hidden units are matched, as M-SMoE's (`--preset paper`: outputs, unmatched); it
              merges the router's rows of a group too, here each keeps its own.
    """

    alike: str = option("weights", "what says that two experts know the same", choices=KNOWLEDGE)

    def reads(self) -> tuple[str, ...]:
        return KNOWLEDGE[self.alike][0]

    def distances(self, layer: LayerStatistics) -> Tensor:
        distance_EE = 1 - KNOWLEDGE[self.alike][1](layer)
        return distance_EE.fill_diagonal_(0)
