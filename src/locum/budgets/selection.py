"""Which experts a method takes by LightMoE's thresholds on gate mass (arXiv 2603.12645, section 3.1).

Letters: E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import ModelShape
from ..stats.sums import Statistics
from .ranking import layer_scores

SELECTIONS = ("adaptive", "uniform", "average")


def layer_thresholds(norms_L: Sequence[float], base: float, alpha: float, clip: float) -> list[float]:
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


@dataclass(frozen=True, eq=False)
class SelectionScores:
    """What `select` reads of a model."""

    scores_LE: Sequence[Tensor]
    norms_L: Sequence[float]  # mean norm of a token's router logits


def selection_scores(statistics: Statistics, shape: ModelShape, score: str) -> SelectionScores:
    """Scores by a criterion, and how strongly every layer's router speaks. Needs logit_norm and tokens."""
    scores_LE = layer_scores(statistics, shape, score)
    layers = [statistics.layer(layer.name) for layer in shape.layers]
    norms_L = tuple(float(layer["logit_norm"] / layer["tokens"].clamp(min=1)) for layer in layers)
    return SelectionScores(scores_LE, norms_L)


def select(
    scored: SelectionScores, shape: ModelShape, amount: float, *, selection: str, alpha: float, clip: float
) -> list[list[int]]:
    """For every layer, the experts to replace, lowest score first.

    selection: "adaptive" (a threshold per layer), "uniform" (one threshold, clip 0), "average" (one count for all).
    `amount` is the base threshold of the paper, or the share of experts for "average".
    """
    if selection == "average":
        counts = [round(amount * layer.num_experts) for layer in shape.layers]
    else:
        thresholds = layer_thresholds(scored.norms_L, amount, alpha, 0.0 if selection == "uniform" else clip)
        counts = [
            0 if amount == 0 else count_below(scores_E, threshold)
            for scores_E, threshold in zip(scored.scores_LE, thresholds, strict=True)
        ]
    orders = [torch.sort(scores_E, stable=True).indices.tolist() for scores_E in scored.scores_LE]
    return [order[:n] for order, n in zip(orders, counts, strict=True)]


def mass_weights(scores_E: Tensor, members: list[int]) -> tuple[float, ...]:
    """What each member weighs in its base (Eq. 4): its share of the score, or equal shares when none has any."""
    mass = scores_E[members].clamp(min=0)
    total = float(mass.sum())
    return tuple((mass / total).tolist()) if total > 0 else (1 / len(members),) * len(members)
