"""MoE-SVD: experts of the layers that bear it become low-rank, and all of a layer read through one expert's factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..budgets.ranks import rank_step
from ..criteria.activation import eao
from ..experts.parts.left_factors import STARTS, LeftFactors
from ..options import option
from ..plans.plan import KEPT, LayerPlan, Slot
from ..shapes import LayerShape, ModelShape
from ..stats.sums import LayerStatistics, Statistics
from . import Weights, method


class Scored(NamedTuple):
    """Of every layer: how sensitive it is, and its experts, the most used first."""

    sensitivity: tuple[float, ...]
    orders: tuple[tuple[int, ...], ...]


@method("moe-svd", paper="OpenReview acJ3vdFljk (MoE-SVD)", published={"trim": 2})
@dataclass(frozen=True)
class MoESVD:
    """Decompose the experts of the least sensitive layers into low-rank factors of which all of a layer share one.

    W_e = U_e V_s for gate, up and down; V_s the factor of the whitened SVD of the most used expert that reads inputs, U_e fitted to it.
    A layer's sensitivity is S = sum_e f_e p_e a_e, f_e how often e is selected, p_e the stable rank of its matrices, a_e the share of
    its outputs beyond three standard deviations.

    With `trim` = k experts share U too: the k most used ones have their own, and every other has the mean of these. As `amount` grows,
    layers are decomposed at full rank one after the other; then their rank, one for all, falls. The router is untouched.

    Needs:    count, stable_rank and what `eao` reads; input_gram and hidden_gram for whitened factors.
    Edges:    a layer that would not get smaller stays whole. A never-routed expert's U is fitted to weights alone. Equal sensitivities
              go by the order of layers.
    Source:   MoE-SVD, ICML 2025, from a structured summary of it. Differs: a share of the layers is decomposed, where the paper sets a
              threshold of S; the stable rank stands for its number of large singular values. U_e is fitted to V_s by least squares,
              where the paper puts the expert's own U Sigma in front of another's V. Trimming is off (`--preset paper`: 2): the summary
              has every expert use the sum of the two most frequent U among those more frequent than itself, which leaves all but two
              experts of a layer the same; here their mean is used, as a sum would double outputs.
    """

    layers: float = option(
        0.75, "share of the layers that are decomposed, the least sensitive first", above=0, at_most=1
    )
    trim: int = option(0, "experts whose factors all others of the layer share; 0: each has its own", at_least=0)
    start: str = option("whitened", "truncated SVD, plain or of what the calibration tokens see", choices=tuple(STARTS))
    multiple: int = option(4, "what the rank is a multiple of; halved for small weights", at_least=1)

    def needs(self) -> tuple[str, ...]:
        read = ("count", "output_histogram", "output_square", "output_sum", "stable_rank")
        return (*read, *STARTS[self.start])

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scored:
        found = [statistics.layer(layer.name) for layer in shape.layers]
        return Scored(tuple(map(sensitivity, found)), tuple(map(_by_use, found)))

    def plan(self, scored: Scored, shape: ModelShape, amount: float) -> list[LayerPlan]:
        least = sorted(range(len(shape.layers)), key=scored.sensitivity.__getitem__)
        chosen = least[: max(1, round(self.layers * len(least)))] if amount > 0 else []
        place = {i: n / len(chosen) for n, i in enumerate(chosen)}
        return [
            self._layer(layer, scored.orders[i], amount, place[i]) if i in place else _whole(layer)
            for i, layer in enumerate(shape.layers)
        ]

    def _layer(self, layer: LayerShape, order: tuple[int, ...], amount: float, place: float) -> LayerPlan:
        """A layer before which this share of those that are decomposed is less sensitive."""
        d, f, step = layer.hidden_size, layer.expert_width, rank_step(layer, self.multiple)
        matrices, trimmed = (3 if layer.has_gate else 2), self.trim + (self.trim > 1)  # those, and their mean
        own = min(trimmed, layer.num_experts) or layer.num_experts
        first = matrices - 1
        of_rank = own * (first * f + d) + first * d + f  # numbers for each step of the rank
        even, full = layer.num_experts * matrices * d * f / of_rank, min(d, f)
        if (1 - amount) * even > full and place >= amount / (1 - full / even):
            return _whole(layer)
        rank = max(step, min(int((1 - amount) * even / step + 1e-9) * step, full))
        slots = [Slot((LeftFactors(rank, order[0], self._of(e, order), self.start),)) for e in range(layer.num_experts)]
        plan, whole = LayerPlan(layer.name, tuple(slots)), _whole(layer)
        return plan if plan.parameters(layer) < whole.parameters(layer) else whole

    def _of(self, e: int, order: tuple[int, ...]) -> tuple[int, ...]:
        most_used = order[: self.trim]
        return (e,) if not most_used or e in most_used else tuple(most_used)


def sensitivity(layer: LayerStatistics) -> float:
    """S of a layer, from its statistics."""
    count_E = layer["count"]
    share_E = count_E / count_E.sum().clamp(min=1)
    outliers_E = eao(layer) / (count_E * layer.shape.hidden_size).clamp(min=1)
    return float((share_E * layer["stable_rank"] * outliers_E).sum())


def _by_use(layer: LayerStatistics) -> tuple[int, ...]:
    return tuple(layer["count"].sort(descending=True, stable=True).indices.tolist())


def _whole(layer: LayerShape) -> LayerPlan:
    return LayerPlan(layer.name, (KEPT,) * layer.num_experts)
