"""HC-SMoE: experts whose outputs are alike are merged, by hierarchical clustering."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import option
from ..stats.sums import LayerStatistics, mean_output
from . import method
from .clustered import Clustered


def _all_tokens(layer: LayerStatistics) -> Tensor:
    """[E, D] mean output over all tokens."""
    return layer["every_output_sum"] / layer["tokens"].clamp(min=1)


MEANS = {
    "routed": (("output_sum", "count"), mean_output),
    "all": (("every_output_sum", "tokens", "count"), _all_tokens),
}


@method("hc-smoe", paper="arXiv 2410.08589 (HC-SMoE)", published={"over": "all", "align": False})
@dataclass(frozen=True)
class HCSMoE(Clustered):
    """Join the two nearest clusters of a layer's experts until few enough are left, and merge each into one expert.

    An expert is its mean output o_e; two clusters are as far apart as their members' o_e are on average (Euclidean). A
    cluster becomes sum_e f_e W_e / sum_e f_e, hidden units matched to its heaviest member's first, and every layer keeps the
    same share. The router is untouched: all members' rows lead to the one expert.

    Needs:    output_sum, count, and what the criterion needs; with `over="all"` every_output_sum and tokens in place of output_sum
              (every expert runs on every token).
    Edges:    experts that were never selected join first, each the one that is nearest, and weigh nothing.
    Source:   HC-SMoE, arXiv 2410.08589. Differs: by default o_e is the mean over the tokens that selected the expert, which needs
              no further work; `over="all"` (`--preset paper`) is the paper's, over all tokens, without matching hidden units, which
              M-SMoE does. Its released scripts name the clustering wrongly and run k-means from random starts instead.
    """

    over: str = option(
        "routed", "over which tokens an expert's mean output is: those that selected it, or all", choices=MEANS
    )

    def reads(self) -> tuple[str, ...]:
        return MEANS[self.over][0]

    def distances(self, layer: LayerStatistics) -> Tensor:
        mean_ED = MEANS[self.over][1](layer)
        return torch.cdist(mean_ED, mean_ED, compute_mode="donot_use_mm_for_euclid_dist")
