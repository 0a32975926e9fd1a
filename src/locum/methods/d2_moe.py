"""D2-MoE: all experts of a layer are one base, and what sets each apart from it in low rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..budgets.groups import over_one_base
from ..budgets.ranking import layer_scores
from ..budgets.selection import mass_weights
from ..criteria.criterion import CRITERIA
from ..experts.parts.low_rank import STARTS
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("d2-moe", paper="arXiv 2502.17298 (D2-MoE)")
@dataclass(frozen=True)
class D2MoE:
    """Put one base per layer under all of its experts, and the rest of each into an adapter of one rank.

    W_e = W_b + B_e A_e,  W_b = sum_e f_e W_e / sum_e f_e, and B_e A_e the whitened SVD of W_e - W_b, cut at rank r

    One rank for all; `amount` lowers it from the rank that saves nothing to none. The router is untouched.

    Needs:    what the criterion needs; input_gram and hidden_gram for whitened starts.
    Edges:    a layer that would not get smaller stays whole. A never-routed expert adds nothing to the base, and its adapter
              is the plain SVD.
    Source:   D2-MoE, arXiv 2502.17298. Differs: f_e is a criterion, where the paper's default is F_e = E[(grad log p)^2] of
              an expert and frequency an ablation; the base keeps all its columns, where the paper prunes some once and
              some for every batch.
    """

    score: str = option("frequency", "criterion by which experts weigh in the base")
    start: str = option(
        "whitened", "truncated SVD, plain or of what the calibration tokens see", choices=("svd", "whitened")
    )
    align: bool = option(False, "match hidden units to the heaviest expert's before averaging")
    multiple: int = option(4, "what the rank is a multiple of; halved for small weights", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, *STARTS[self.start].needs)

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        return layer_scores(statistics, shape, self.score)

    def plan(self, scored: tuple[Tensor, ...], shape: ModelShape, amount: float) -> list[LayerPlan]:
        how = {"start": self.start, "align": self.align, "multiple": self.multiple}
        return [
            over_one_base(layer, mass_weights(scores_E, list(range(layer.num_experts))), amount, **how)
            for layer, scores_E in zip(shape.layers, scored, strict=True)
        ]
