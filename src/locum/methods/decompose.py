"""Decompose: every expert becomes a low-rank stand-in, with a rank that follows its importance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets.ranking import layer_scores
from ..budgets.ranks import allocate_ranks, rank_bounds, rank_shares
from ..criteria.criterion import CRITERIA
from ..experts.parts.low_rank import STARTS
from ..options import option
from ..plans.plan import KEPT, LayerPlan, Slot, stand_in
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@dataclass(frozen=True)
class LowRank:
    """Options and slots of methods that decompose experts."""

    start: str = option(
        "whitened", "truncated SVD, plain or of what the calibration tokens see", choices=("svd", "whitened")
    )
    exponent: float = option(0.15, "how much ranks follow importance; 0: all alike", at_least=0, at_most=10)
    minimum: int = option(1, "smallest rank of an expert, rounded up to the multiple", at_least=1)
    multiple: int = option(16, "what ranks are multiples of; halved for small weights", at_least=1)

    def low_rank_slots(self, importance_E: Tensor, layer: LayerShape, amount: float) -> list[Slot]:
        """A slot for each of these experts of a layer; their mean rank falls from break-even to the minimum."""
        least, dense, step = rank_bounds(layer, self.minimum, self.multiple)
        total = int(len(importance_E) * (dense + amount * (least - dense)) + 1e-6)
        ranks = allocate_ranks(rank_shares(importance_E, self.exponent), total, least, dense, step)
        return [KEPT if rank == dense else stand_in(rank=rank, start=self.start) for rank in ranks]


@method("decompose", paper="arXiv 2411.01016 (MoE-I2)", published={"start": "svd"})
@dataclass(frozen=True)
class Decompose(LowRank):
    """Decompose every expert into low-rank factors, with more rank for experts that matter more.

    R_e = (I_e + eps)^a / sum_i (I_i + eps)^a * R_mean * E,  a = `exponent`, R_mean the layer's mean rank

    One rank for an expert's projections; all layers have the same mean rank, which `amount` lowers from break-even. An
    expert whose rank would reach break-even, D F / (D + F), stays whole. Ranks are multiples of `multiple`, which is
    halved until four steps fit into the smaller side of the weights (so below 64 for the default), and never below
    `minimum`; what this frees or takes goes to the others. `exponent=0` or `score="none"` gives all experts one rank
    (up to a step); with `start="svd"` as well it needs no statistics. `start="whitened"` takes the SVD of W S, S S^T the
    Gram matrix of an expert's inputs: it keeps what the calibration tokens use.

    Needs:    what the criterion needs; input_gram and hidden_gram for whitened factors.
    Edges:    a never-routed expert gets the smallest rank and a plain SVD; too small weights (break-even at the minimum)
              stay whole.
    Source:   MoE-I2, arXiv 2411.01016, intra-expert decomposition; whitening from SVD-LLM, arXiv 2403.07378. Differs:
              importance is a criterion's score, not a loss of the pruned model (`moe-i2` has that); the guards on ranks.
    """

    score: str = option("reap", "criterion that ranks follow, or none")

    def needs(self) -> tuple[str, ...]:
        scored = self.score != "none" and self.exponent > 0
        return (*(CRITERIA[self.score].needs if scored else ()), *STARTS[self.start].needs)

    def score_experts(
        self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        if self.score == "none" or self.exponent == 0:
            return tuple(torch.ones(layer.num_experts, dtype=torch.float64) for layer in shape.layers)
        return layer_scores(statistics, shape, self.score)

    def plan(self, scored: tuple[Tensor, ...], shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(layer.name, tuple(self.low_rank_slots(importance_E, layer, amount)))
            for layer, importance_E in zip(shape.layers, scored, strict=True)
        ]
