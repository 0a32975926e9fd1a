"""What methods share that merge every expert of a layer into the dominant one that is most like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..budgets.groups import ranked
from ..budgets.ranking import layer_scores
from ..shapes import ModelShape
from ..stats.sums import LayerStatistics, Statistics


class Dominance(NamedTuple):
    """What grouping reads of every layer."""

    scores_LE: Sequence[Tensor]
    ranked_L: Sequence[list[int]]  # its experts, the highest score first
    alike_LEE: Sequence[Tensor]


def dominance(
    statistics: Statistics, shape: ModelShape, score: str, alike: Callable[[LayerStatistics], Tensor]
) -> Dominance:
    """By the criterion `score`; `alike` says how like one another two experts of a layer are, [E, E]."""
    scores_LE = layer_scores(statistics, shape, score)
    layers = [statistics.layer(layer.name) for layer in shape.layers]
    ranked_L = tuple(ranked(scores_E, layer) for scores_E, layer in zip(scores_LE, layers, strict=True))
    return Dominance(scores_LE, ranked_L, tuple(map(alike, layers)))
