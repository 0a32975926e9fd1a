"""HOPE: which experts go together is a quadratic program over pairs of experts.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import LinearConstraint, minimize

from ..budgets.ranking import Ranking
from ..options import option
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import LayerStatistics, Statistics
from . import Weights, method
from .ranked import Ranked


class Scores(NamedTuple):
    """What says how many experts go, and what each pair of them costs."""

    ranking: Ranking
    cost_LEE: Sequence[np.ndarray]


class Choice(NamedTuple):
    """One layer's question: what pairs cost, how many experts go, which stay anyway, and the groups that give equally many."""

    cost_EE: np.ndarray
    count: int
    kept_E: np.ndarray
    groups: Sequence[np.ndarray]

    def of(self, gone_E: np.ndarray) -> float:
        return float(gone_E @ self.cost_EE @ gone_E)


@method("hope", paper="arXiv 2609.18916 (HOPE)", published={"solver": "relaxed"})
@dataclass(frozen=True)
class HOPE(Ranked):
    """Drop the set of experts that contributes least together, alone and in pairs.

    min over p in {0, 1}^E, sum_e p_e = P: p^T F p,  F_ij = mean over tokens routed to i and j of a_i a_j, F_ee = mean over tokens
    routed to e of a_e^2, a_e = g_t,e ||f_e(x_t)||_2

    Without pairs this is pruning by a mean square of REAP's quantity. The budget, and the criterion where the budget reads one,
    say how many experts each layer gives; the program says which. `exchange` takes one expert after the other, the one that adds
    least, and then swaps one that goes for one that stays as long as that lowers the sum. `relaxed` lets p be any number from 0
    to 1 (SLSQP, from P / E) and takes the P largest.

    Needs:    gated_norm_product and co_count, what criterion and budget need, and output_peak, by which Super Experts are found.
    Edges:    never below top-k; equal numbers per group for group-limited routers; Super Experts stay unless told not to. Both
              solvers may stop at a local optimum. Never-routed experts go first. Of equals the one with the lower index goes.
    Source:   HOPE, arXiv 2609.18916, from a summary of the paper and its solver's published parts. Differs: `exchange` is the
              default (`--preset paper` relaxes); it ends at a sum that no single swap lowers, which rounding need not.
    """

    solver: str = option("exchange", "how the set is looked for", choices=("exchange", "relaxed"))

    def needs(self) -> tuple[str, ...]:
        return (*super().needs(), "gated_norm_product", "co_count")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        costs = tuple(_costs(statistics.layer(layer.name)) for layer in shape.layers)
        return Scores(super().score_experts(statistics, shape), costs)

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        counts = [len(gone) for gone in self.taken(scored.ranking, shape, amount)]
        layers = zip(shape.layers, scored.cost_LEE, scored.ranking.scores_LE, counts, strict=True)
        plans = []
        for layer, cost_EE, scores_E, count in layers:
            gone_E = SOLVERS[self.solver](_choice(layer, cost_EE, scores_E.isinf().numpy(), count)) > 0
            plans.append(LayerPlan(layer.name, tuple(DROPPED if gone else KEPT for gone in gone_E.tolist())))
        return plans


def _costs(layer: LayerStatistics) -> np.ndarray:
    """[E, E] the matrix F."""
    return (layer["gated_norm_product"] / layer["co_count"].clamp(min=1)).numpy()


def _choice(layer: LayerShape, cost_EE: np.ndarray, kept_E: np.ndarray, count: int) -> Choice:
    groups = np.split(np.arange(layer.num_experts), layer.num_groups)
    return Choice(cost_EE, count, kept_E, groups)


def by_exchange(choice: Choice) -> np.ndarray:
    """[E] ones where an expert goes: first the one that adds least, again and again, then the best swaps while they help."""
    gone_E = np.zeros(len(choice.kept_E))
    for _ in range(choice.count // len(choice.groups)):
        for group in choice.groups:
            adds_E = np.diagonal(choice.cost_EE) + 2 * choice.cost_EE @ gone_E
            free = group[(gone_E[group] == 0) & ~choice.kept_E[group]]
            gone_E[free[np.argmin(adds_E[free])]] = 1
    while True:
        change, out, into = min(_best_swap(choice, gone_E, group) for group in choice.groups)
        if not change < -1e-12 * choice.of(gone_E):
            return gone_E
        gone_E[out], gone_E[into] = 0, 1


def _best_swap(choice: Choice, gone_E: np.ndarray, group: np.ndarray) -> tuple[float, int, int]:
    """By how much the sum changes where one of a group that goes stays, and one that stays goes instead."""
    going, staying = group[gone_E[group] > 0], group[(gone_E[group] == 0) & ~choice.kept_E[group]]
    if not len(going) or not len(staying):
        return (0.0, -1, -1)
    cost_EE, pull_E = choice.cost_EE, choice.cost_EE @ gone_E
    alone_E = np.diagonal(cost_EE)
    less = alone_E[going] - 2 * pull_E[going]
    more = alone_E[staying] + 2 * pull_E[staying]
    change = less[:, None] + more[None, :] - 2 * cost_EE[np.ix_(going, staying)]
    i, j = np.unravel_index(np.argmin(change), change.shape)
    return (float(change[i, j]), int(going[i]), int(staying[j]))


def by_relaxation(choice: Choice) -> np.ndarray:
    """[E] ones for the experts with the largest shares in a local optimum of the program over shares from 0 to 1."""
    size, each = len(choice.kept_E), choice.count // len(choice.groups)
    gone_E = np.zeros(size)
    if not each:
        return gone_E
    scale = max(float(np.abs(choice.cost_EE).max()), 1e-300)  # so that the tolerance means the same whatever the units
    cost_EE = choice.cost_EE / scale
    rows = np.zeros((len(choice.groups), size))
    for row, group in zip(rows, choice.groups, strict=True):
        row[group] = 1
    found = minimize(
        lambda p: p @ cost_EE @ p,
        np.full(size, choice.count / size),
        jac=lambda p: 2 * cost_EE @ p,
        method="SLSQP",
        bounds=[(0, 0 if kept else 1) for kept in choice.kept_E],
        constraints=LinearConstraint(rows, each, each),
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    share_E = np.where(choice.kept_E, -1.0, found.x)
    for group in choice.groups:
        gone_E[group[np.argsort(-share_E[group], kind="stable")[:each]]] = 1
    return gone_E


SOLVERS: dict[str, Callable[[Choice], np.ndarray]] = {"exchange": by_exchange, "relaxed": by_relaxation}
