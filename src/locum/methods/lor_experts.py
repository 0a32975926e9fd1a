"""LorExperts: of experts that are selected together the busiest stays whole, and the others are that one with a low-rank adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets.groups import groups_left
from ..experts.parts.low_rank import STARTS
from ..options import option
from ..plans.plan import KEPT, Base, LayerPlan, stand_in
from ..shapes import LayerShape, ModelShape
from ..stats.sums import LayerStatistics
from . import method
from .clustered import Clustered, Scores

FACTORS = ("svd", "whitened")


@method("lor-experts", paper="arXiv 2608.07814 (LorExperts)", published={"rank": 64})
@dataclass(frozen=True)
class LorExperts(Clustered):
    """Keep the expert with the highest score of every cluster whole, and make each other one that expert and an adapter.

    W_e = T_e^T (W_r + B_e A_e),  W_r the representative of e's cluster, T_e the permutation of hidden units that brings W_e nearest
    to it, B_e A_e the SVD of T_e W_e - W_r, cut at one rank

    Two experts are 1 - n_ij / sqrt(n_i n_j) apart, n_ij the tokens that selected both; the nearest clusters join until few enough
    are left, the same share in every layer. The router is untouched.

    Needs:    co_count, count, what the criterion needs, and input_gram and hidden_gram for whitened factors.
    Edges:    experts that were never selected join first and represent nothing while another can. A layer that would not get smaller
              stays whole.
    Source:   LorExperts, arXiv 2608.07814, from a note on it: clusters by co-activation, the most used one whole, the rest in rank 64
              after matching hidden units. Differs: clusters are joined one after the other, where the paper runs k-medoids; rank 16
              (`--preset paper`: 64); factors are whitened by inputs at once, where it fits them to outputs afterwards; no number of
              most used experts is kept besides.
    """

    rank: int = option(16, "rank of every adapter", at_least=1)
    start: str = option("whitened", "truncated SVD, plain or of what the calibration tokens see", choices=FACTORS)

    def needs(self) -> tuple[str, ...]:
        return (*super().needs(), *STARTS[self.start].needs)

    def reads(self) -> tuple[str, ...]:
        return ("co_count",)

    def distances(self, layer: LayerStatistics) -> Tensor:
        count_E = layer["co_count"].diagonal().clamp(min=1).sqrt()
        distance_EE = (1 - layer["co_count"] / count_E[:, None] / count_E[None, :]).clamp(min=0)
        return distance_EE.fill_diagonal_(0)

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            self._layer(layer, joined.groups(groups_left(layer, amount)), scores_E)
            for layer, scores_E, joined in zip(shape.layers, *scored, strict=True)
        ]

    def _layer(self, layer: LayerShape, groups: Sequence[Sequence[int]], scores_E: Tensor) -> LayerPlan:
        rank = min(self.rank, layer.hidden_size, layer.expert_width)
        slots, bases = [KEPT] * layer.num_experts, []
        for members in (sorted(group) for group in groups if len(group) > 1):
            first = members[int(torch.argmax(scores_E[members]))]
            for e in members:
                slots[e] = stand_in(
                    base=len(bases), rank=0 if e == first else rank, start="gaussian" if e == first else self.start
                )
            named = members if self.align else [first]
            bases.append(Base(tuple(named), tuple(float(e == first) for e in named), self.align))
        plan, whole = (
            LayerPlan(layer.name, tuple(slots), tuple(bases)),
            LayerPlan(layer.name, (KEPT,) * layer.num_experts),
        )
        return plan if plan.parameters(layer) < whole.parameters(layer) else whole
