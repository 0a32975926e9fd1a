"""Which experts a method takes: LightMoE's thresholds on gate mass (arXiv 2603.12645, section 3.1), or the lowest scored.

Letters: E experts, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..criteria.criterion import CRITERIA
from ..shapes import ModelShape
from ..stats.sums import Statistics
from .counts import global_counts, lowest, uniform_counts

SELECTIONS = ("adaptive", "uniform", "average")
BUDGETS = ("uniform", "global")


def layer_thresholds(norms_L: list[float], base: float, alpha: float, clip: float) -> list[float]:
    """The cumulative score that may be replaced in each layer (Eq. 3, 8).

    threshold_j = clip(base * exp(-alpha (norm_j - 1)), (1 - clip) base, (1 + clip) base), norm_j being the mean router
    output norm of layer j over the mean of all layers: layers with larger router outputs are compressed less.
    """
    mean = sum(norms_L) / len(norms_L) or 1.0
    raw = [base * math.exp(-alpha * (norm / mean - 1)) for norm in norms_L]
    return [min(max(value, (1 - clip) * base), (1 + clip) * base) for value in raw]


def count_below(scores_E: Tensor, threshold: float) -> int:
    """Experts in the shortest prefix, lowest score first, whose share of the total just exceeds the threshold."""
    share_E = torch.sort(scores_E, stable=True).values / scores_E.sum().clamp(min=1e-300)
    return min(1 + int((share_E.cumsum(0) <= threshold).sum()), scores_E.shape[0])


def select(
    statistics: Statistics, shape: ModelShape, amount: float, *, selection: str, score: str, alpha: float, clip: float
) -> list[tuple[list[int], Tensor]]:
    """For every layer, the experts to replace (lowest score first) and all scores.

    selection: "adaptive" (a threshold per layer), "uniform" (one threshold, clip 0), "average" (one count for all).
    `amount` is the base threshold of the paper, or the share of experts for "average".
    """
    layers = [statistics.layer(layer.name) for layer in shape.layers]
    scores_LE = [CRITERIA[score](layer) for layer in layers]
    if selection == "average":
        counts = [round(amount * layer.num_experts) for layer in shape.layers]
    else:
        norms_L = [float(layer["logit_norm"] / layer["tokens"].clamp(min=1)) for layer in layers]
        thresholds = layer_thresholds(norms_L, amount, alpha, 0.0 if selection == "uniform" else clip)
        counts = [
            0 if amount == 0 else count_below(scores_E, threshold)
            for scores_E, threshold in zip(scores_LE, thresholds, strict=True)
        ]
    orders = [torch.sort(scores_E, stable=True).indices.tolist() for scores_E in scores_LE]
    return [(order[:n], scores) for order, n, scores in zip(orders, counts, scores_LE, strict=True)]


def select_lowest(
    statistics: Statistics, shape: ModelShape, amount: float, *, score: str, budget: str
) -> list[set[int]]:
    """For every layer, the lowest-scored experts: the same share of each ("uniform"), or all ranked together ("global")."""
    scores_LE = [CRITERIA[score](statistics.layer(layer.name)) for layer in shape.layers]
    counts = uniform_counts(shape, amount) if budget == "uniform" else global_counts(scores_LE, shape, amount)
    layers = zip(scores_LE, counts, shape.layers, strict=True)
    return [set(lowest(scores_E, count, layer.num_groups)) for scores_E, count, layer in layers]


def mass_weights(scores_E: Tensor, members: list[int]) -> tuple[float, ...]:
    """What each member weighs in its base (Eq. 4): its share of the score, or equal shares when none has any."""
    mass = scores_E[members].clamp(min=0)
    total = float(mass.sum())
    return tuple((mass / total).tolist()) if total > 0 else (1 / len(members),) * len(members)
