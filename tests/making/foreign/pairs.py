"""A merging method of another package: the least used experts of a layer are merged in pairs, by how alike their weights are."""

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
    """Merge experts in pairs, the least used ones first, each with the nearest by its weights.

    Needs:    count, and the weights of one layer at a time.
    """

    align: bool = option(False, "permute hidden units before averaging")

    def needs(self) -> tuple[str, ...]:
        return ("count",)

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Any:
        """Pairs of each layer, the least used first."""
        return [self._pairs(statistics.layer(x.name)["count"], weights(x.name), x.num_experts) for x in shape.layers]

    def _pairs(self, count_E: Tensor, read: Any, num_experts: int) -> list[tuple[int, int]]:
        flat = torch.stack([read(e).down_DF.float().flatten() for e in range(num_experts)])
        distance_EE = torch.cdist(flat, flat)
        free, pairs = set(range(num_experts)), []
        for e in torch.sort(count_E, stable=True).indices.tolist():
            if e in free and len(free) > 1:
                free.remove(e)
                other = min(free, key=lambda o: (float(distance_EE[e, o]), o))
                free.remove(other)
                pairs.append((min(e, other), max(e, other)))
        return pairs

    def plan(self, scored: list[list[tuple[int, int]]], shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = []
        for pairs, layer in zip(scored, shape.layers, strict=True):
            chosen = pairs[: round(amount * len(pairs))]
            slots = [KEPT] * layer.num_experts
            for b, pair in enumerate(chosen):
                for e in pair:
                    slots[e] = Slot((SharedBase(b),))
            plans.append(LayerPlan(layer.name, tuple(slots), tuple(Base(p, (0.5, 0.5), self.align) for p in chosen)))
        return plans
