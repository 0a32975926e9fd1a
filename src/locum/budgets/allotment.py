"""Choosing a number for every layer so that the sum of costs is least: dynamic programming, or an integer program.

Letters: L layers, X numbers of experts that a layer may lose, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from ..errors import PlanError


def cheapest(cost_LX: Sequence[np.ndarray], least: int) -> list[int]:
    """For every layer how many experts it loses, `least` or more together, at the least sum of costs. Exact.

    cost_LX[l][n] is what it costs layer l to lose n experts, infinite where it may not. Of equal sums the smallest total is
    taken. Where `least` cannot be reached, the most that can. Cost: L * X * (sum of X) steps.
    """
    least = min(least, sum(_most(cost_X) for cost_X in cost_LX))
    totals = sum(len(cost_X) - 1 for cost_X in cost_LX) + 1
    best = np.full(totals, np.inf)
    best[0] = 0.0
    chosen = []
    for cost_X in cost_LX:
        sums, choice = np.full(totals, np.inf), np.zeros(totals, dtype=np.int64)
        for n in np.flatnonzero(np.isfinite(cost_X)):
            with_n = best[: totals - n] + cost_X[n]
            better = with_n < sums[n:]
            sums[n:][better], choice[n:][better] = with_n[better], n
        best = sums
        chosen.append(choice)
    total = least + int(np.argmin(best[least:]))
    counts = []
    for choice in reversed(chosen):
        counts.append(int(choice[total]))
        total -= counts[-1]
    return counts[::-1]


def cheapest_of_few(cost_LX: Sequence[np.ndarray], experts_L: Sequence[int], least: int, distinct: int) -> list[int]:
    """As `cheapest`, where layers keep at most `distinct` different numbers of their experts [L]. An integer program."""
    pairs = [(i, int(n)) for i, cost_X in enumerate(cost_LX) for n in np.flatnonzero(np.isfinite(cost_X))]
    kept = sorted({experts_L[i] - n for i, n in pairs})
    cost = np.array([cost_LX[i][n] for i, n in pairs] + [0.0] * len(kept))
    lost = np.array([n for _, n in pairs] + [0] * len(kept), dtype=float)
    one, use = lil_array((len(cost_LX), len(cost))), lil_array((len(kept), len(cost)))
    for column, (i, n) in enumerate(pairs):
        one[i, column] = 1
        use[kept.index(experts_L[i] - n), column] = 1
    for row in range(len(kept)):
        use[row, len(pairs) + row] = -len(cost_LX)  # a number that some layer keeps counts
    numbers = np.array([0.0] * len(pairs) + [1.0] * len(kept))
    rules = [
        LinearConstraint(one.tocsr(), 1, 1),
        LinearConstraint(use.tocsr(), -np.inf, 0),
        LinearConstraint(numbers, 0, distinct),
    ]
    most = _solved(-lost, rules)
    reached = min(least, round(float(lost @ most)))
    found = _solved(cost, [*rules, LinearConstraint(lost, reached, np.inf)])
    counts = [0] * len(cost_LX)
    for column, (i, n) in enumerate(pairs):
        if found[column] > 0.5:
            counts[i] = n
    return counts


def _solved(cost: np.ndarray, rules: list[LinearConstraint]) -> np.ndarray:
    scale = np.abs(cost).max() or 1.0
    result = milp(cost / scale, constraints=rules, integrality=np.ones(len(cost)), bounds=Bounds(0, 1))
    if result.x is None:
        raise PlanError(
            "no choice of experts keeps to --multiple and --distinct at once; allow more different numbers, or another multiple"
        )
    return result.x


def _most(cost_X: np.ndarray) -> int:
    return int(np.flatnonzero(np.isfinite(cost_X))[-1])
