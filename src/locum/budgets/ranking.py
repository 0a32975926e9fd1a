"""What the lowest-scored experts are taken by: scores, what is kept whatever its score, and how many each layer can lose.

Letters: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..criteria.criterion import CRITERIA
from ..criteria.super_experts import super_experts
from ..shapes import ModelShape
from ..stats.sums import LayerStatistics, Statistics
from .counts import most_to_lose


@dataclass(frozen=True, eq=False)
class Ranking:
    """What budgets read. A kept expert has an infinite score; a layer's mass is that of the others."""

    scores_LE: Sequence[Tensor]
    most_L: Sequence[int]  # experts that each layer can lose
    statistics_L: Sequence[LayerStatistics]

    @property
    def mass_L(self) -> list[float]:
        return [max(0.0, float(scores_E[scores_E.isfinite()].sum())) for scores_E in self.scores_LE]


def layer_scores(statistics: Statistics, shape: ModelShape, score: str) -> tuple[Tensor, ...]:
    """[E] of every layer: what a criterion says of its experts."""
    return tuple(CRITERIA[score](statistics.layer(layer.name)) for layer in shape.layers)


def ranking(statistics: Statistics, shape: ModelShape, score: str, protect: bool, floor: int = 0) -> Ranking:
    """Scores by a criterion, Super Experts kept where they are protected. Needs what both read."""
    return protected(layer_scores(statistics, shape, score), statistics, shape, protect, floor)


def protected(
    scores_LE: Sequence[Tensor], statistics: Statistics, shape: ModelShape, protect: bool, floor: int = 0
) -> Ranking:
    """The same by scores that are there."""
    kept_L = super_experts(statistics, shape) if protect else [set() for _ in shape.layers]
    scores_LE = tuple(
        scores_E.index_fill(
            0, torch.tensor(sorted(kept), dtype=torch.int64), torch.inf
        )  # a criterion's own tensor stays
        for scores_E, kept in zip(scores_LE, kept_L, strict=True)
    )
    most_L = [most_to_lose(layer, kept, floor) for layer, kept in zip(shape.layers, kept_L, strict=True)]
    return Ranking(scores_LE, most_L, [statistics.layer(layer.name) for layer in shape.layers])
