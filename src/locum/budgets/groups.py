"""Which experts go together: groups of a layer's experts that share a base, and the plan that merges each into one.

Letters: E experts, D model width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from ..plans.plan import KEPT, Base, LayerPlan, stand_in
from ..shapes import LayerShape
from ..stats.sums import LayerStatistics
from .ranks import break_even, rank_step
from .selection import mass_weights


def routing_likeness(layer: LayerStatistics) -> Tensor:
    """[E, E] mean over samples of the cosine of two experts' router logits."""
    return layer["logit_cosine"] / layer["samples"].clamp(min=1)


def output_likeness(layer: LayerStatistics) -> Tensor:
    """[E, E] mean over all tokens of the cosine of two experts' outputs."""
    return layer["output_cosine"] / layer["tokens"].clamp(min=1)


def weight_likeness(layer: LayerStatistics) -> Tensor:
    """[E, E] cosine of two experts' weights, each as one long vector; 0 with one that is all zeros."""
    product_EE = layer["weight_product"]
    length_E = product_EE.diagonal().clamp(min=0).sqrt()
    scale_E = torch.where(length_E > 0, length_E, torch.inf)
    return product_EE / scale_E[:, None] / scale_E[None, :]


class Likeness(NamedTuple):
    """How alike two experts are: -1 to 1, higher is more alike."""

    needs: tuple[str, ...]  # statistics
    of: Callable[[LayerStatistics], Tensor]  # [E, E], symmetric


LIKENESS: dict[str, Likeness] = {
    "outputs": Likeness(("output_cosine", "tokens"), output_likeness),
    "routing": Likeness(("logit_cosine", "samples"), routing_likeness),
    "weights": Likeness(("weight_product",), weight_likeness),
}


def ranked(scores_E: Tensor, layer: LayerStatistics) -> list[int]:
    """A layer's experts, the highest score first; of equal scores the one with more router probability. Needs softmax_sum."""
    keys = list(zip(scores_E.tolist(), layer["softmax_sum"].tolist(), strict=True))
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)


def join_dominant(similarity_EE: Tensor, dominant: Sequence[int], others: Sequence[int]) -> list[list[int]]:
    """One group per dominant expert, in their order; every other one joins the dominant expert that is most like it.

    Ties go to the dominant expert that comes first.
    """
    groups = {d: [d] for d in dominant}
    for e in others:
        groups[max(dominant, key=lambda d: (float(similarity_EE[e, d]), -dominant.index(d)))].append(e)
    return list(groups.values())


def group_by_dominance(
    similarity_EE: Tensor, candidates: list[int], scores_E: Tensor, num_bases: int
) -> list[list[int]]:
    """One group per dominant expert (the highest-scored candidates); the others join the one most alike in routing."""
    # candidates come lowest score first
    return join_dominant(similarity_EE, candidates[-num_bases:][::-1], candidates[:-num_bases])


def group_by_kmeans(mean_ED: Tensor, candidates: list[int], scores_E: Tensor, num_bases: int) -> list[list[int]]:
    """Groups by k-means (fixed seed) on the experts' mean outputs, as HC-SMoE's k-means variant (arXiv 2410.08589)."""
    points, point_of = np.unique(mean_ED[candidates].numpy(), axis=0, return_inverse=True)
    with warnings.catch_warnings(action="ignore"):  # a cluster that became empty is one base fewer
        _, labels = kmeans2(points, min(num_bases, len(points)), minit="++", rng=0)
    return [[e for e, p in zip(candidates, point_of, strict=True) if labels[p] == b] for b in range(num_bases)]


def groups_left(layer: LayerShape, amount: float) -> int:
    """How many groups a layer's experts form where every layer keeps the same share: all of them for 0, one for 1."""
    return layer.num_experts - int(amount * (layer.num_experts - 1) + 1e-9)


def merged(layer: LayerShape, groups: Sequence[Sequence[int]], scores_E: Tensor, align: bool) -> LayerPlan:
    """The plan in which the members of every group are one expert: the mean of their weights, weighted by score.

    The router keeps a row for each, so all of them lead to that expert. An expert that is alone in its group is kept.
    """
    slots, bases = [KEPT] * layer.num_experts, []
    for members in (sorted(group) for group in groups if len(group) > 1):
        for e in members:
            slots[e] = stand_in(base=len(bases))
        bases.append(Base(tuple(members), mass_weights(scores_E, members), align))
    return LayerPlan(layer.name, tuple(slots), tuple(bases))


def aliased(layer: LayerShape, groups: Sequence[Sequence[int]]) -> LayerPlan:
    """The plan in which the first member of every group, its weights as they are, stands in for all of the group.

    The router keeps a row for each. An expert that is alone in its group is kept.
    """
    slots, bases = [KEPT] * layer.num_experts, []
    for members in sorted((group for group in groups if len(group) > 1), key=min):
        for e in members:
            slots[e] = stand_in(base=len(bases))
        bases.append(Base((members[0],), (1.0,)))
    return LayerPlan(layer.name, tuple(slots), tuple(bases))


def over_one_base(
    layer: LayerShape, weights: Sequence[float], amount: float, *, start: str, align: bool, multiple: int
) -> LayerPlan:
    """The plan in which all experts of a layer are one base and an adapter each, of one rank: what is left at this amount, from
    the rank that saves nothing (0) to none (1). Ranks are multiples of `multiple`, or of less where that is too much."""
    whole = LayerPlan(layer.name, (KEPT,) * layer.num_experts)
    if amount <= 0:
        return whole
    step = rank_step(layer, multiple)
    rank = int((1 - amount) * break_even(layer) / step + 1e-9) * step
    base = Base(tuple(range(layer.num_experts)), tuple(weights), align)
    plan = LayerPlan(layer.name, (stand_in(base=0, rank=rank, start=start),) * layer.num_experts, (base,))
    return plan if plan.parameters(layer) < whole.parameters(layer) else whole
