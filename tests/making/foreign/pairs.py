"""A merging method of another package: the least used experts of a layer are merged in pairs, by use and by weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locum.experts.parts.shared_base import SharedBase
from locum.methods import Weights, method
from locum.options import option
from locum.plans.plan import KEPT, Base, LayerPlan, Slot
from locum.shapes import ModelShape
from locum.stats.sums import Statistics


@method("pairs", paper="arXiv 2310.01334 (MC-SMoE)", reads_weights=True)
@dataclass(frozen=True)
class Pairs:
    """Merge experts in pairs, the least used ones first; of four in a row by use, those whose weights are nearest.

    base = (n_a W_a + n_b W_b) / (n_a + n_b),   n the tokens of an expert

    Needs:    count, and the weights of one layer at a time.
    Edges:    a never-routed expert has weight 0 in its base, two of them half each.
    Source:   this package; weights by use are those of MC-SMoE, arXiv 2310.01334.
    """

    align: bool = option(False, "permute hidden units before averaging")

    def needs(self) -> tuple[str, ...]:
        return ("count",)

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Any:
        """Of each layer, bases of two experts each, the least used first."""
        return [self._pairs(statistics.layer(x.name)["count"], weights(x.name), x.num_experts) for x in shape.layers]

    def _pairs(self, count_E: Tensor, read: Any, num_experts: int) -> list[Base]:
        flat = torch.stack([read(e).down_DF.float().flatten() for e in range(num_experts)])
        distance_EE = torch.cdist(flat, flat)
        order = sorted(range(num_experts), key=lambda e: (float(count_E[e]), float(flat[e].sum())))  # ties by weights
        pairs: list[tuple[int, int]] = []
        for four in (order[i : i + 4] for i in range(0, num_experts - 1, 4)):
            while len(four) > 1:
                partner = min(four[1:], key=lambda e, first=four[0]: float(distance_EE[first, e]))
                pairs.append((four[0], partner))
                four = [e for e in four if e not in pairs[-1]]
        return [self._base(pair, count_E) for pair in pairs]

    def _base(self, pair: tuple[int, int], count_E: Tensor) -> Base:
        used = [float(count_E[e]) for e in pair]
        weights = [n / sum(used) for n in used] if sum(used) else [0.5, 0.5]
        return Base(pair, tuple(weights), self.align)

    def plan(self, scored: list[list[Base]], shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = []
        for bases, layer in zip(scored, shape.layers, strict=True):
            chosen = bases[: round(amount * len(bases))]
            slots = [KEPT] * layer.num_experts
            for b, base in enumerate(chosen):
                for e in base.experts:
                    slots[e] = Slot((SharedBase(b),))
            plans.append(LayerPlan(layer.name, tuple(slots), tuple(chosen)))
        return plans
