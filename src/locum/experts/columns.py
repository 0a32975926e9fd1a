"""Scores of an expert's columns, each one number of its hidden state: a row of gate and up and a column of down.

An expert that gets narrower keeps the columns with the highest scores, of equal ones the first.

Letters: E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..stats.sums import LayerStatistics

PEAK = 0.9  # alpha of CAMERA


class Columns(NamedTuple):
    """What is read, and [E, F] of a layer: higher means keep."""

    needs: tuple[str, ...]  # statistics
    scores: Callable[[LayerStatistics], Tensor]


def camera_columns(layer: LayerStatistics) -> Tensor:
    """[E, F] CAMERA's energy of every column: ||W_down[:, c]||^2 ((1 - a) sum_t (g h_c)^2 + a max_t (g h_c)^2), a = 0.9."""
    spread_EF, peak_EF = layer["gated_hidden_square"], layer["gated_hidden_peak"].square()
    return layer["down_column_square"] * ((1 - PEAK) * spread_EF + PEAK * peak_EF)


def heapr_columns(layer: LayerStatistics) -> Tensor:
    """[E, F] HEAPr's second-order loss of every column: mean_t h_c^2 * mean_t (dL / dh_c)^2, over the tokens routed to e."""
    count_E1 = layer["count"].clamp(min=1)[:, None]
    return layer["hidden_square"] / count_E1 * layer["hidden_gradient_square"] / count_E1


COLUMNS: dict[str, Columns] = {
    "camera": Columns(("gated_hidden_square", "gated_hidden_peak", "down_column_square"), camera_columns),
    "heapr": Columns(("count", "hidden_square", "hidden_gradient_square"), heapr_columns),
}


def highest(scores_F: Tensor, count: int) -> Tensor:
    """The numbers of the columns with the highest scores, ascending."""
    return scores_F.sort(descending=True, stable=True).indices[:count].sort().values
