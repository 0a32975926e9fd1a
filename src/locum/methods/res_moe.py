"""ResMoE: all experts of a layer are their centre, with hidden units matched, and what is left of each in low rank."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.groups import over_one_base
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("res-moe", paper="arXiv 2503.06881 (ResMoE)")
@dataclass(frozen=True)
class ResMoE:
    """Put the centre of a layer's experts, their hidden units matched, under all of them, and the rest into adapters.

    W_e = T_e^T (W_c + B_e A_e),  W_c = mean_e T_e W_e, T_e the permutation of hidden units that brings W_e nearest to expert
    0's, and B_e A_e the truncated SVD of T_e W_e - W_c

    The permutation of an expert's hidden units changes nothing of what it computes, so it is not undone. Reads no data.
    One rank for all; `amount` lowers it from the rank that saves nothing to none.

    Needs:    nothing but the checkpoint.
    Edges:    a layer that would not get smaller stays whole.
    Source:   ResMoE, arXiv 2503.06881, its SVD variant. Differs: the centre is the mean after one matching to one expert,
              where the paper's Wasserstein barycentre matches to the centre anew up to 100 times; every layer takes part,
              the paper's last 24 of 32; factors are stored, where its released script writes dense weights back.
    """

    multiple: int = option(4, "what the rank is a multiple of; halved for small weights", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return ()

    def score_experts(self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None) -> None:
        return None

    def plan(self, scored: None, shape: ModelShape, amount: float) -> list[LayerPlan]:
        how = {"start": "svd", "align": True, "multiple": self.multiple}
        return [
            over_one_base(layer, (1 / layer.num_experts,) * layer.num_experts, amount, **how) for layer in shape.layers
        ]
