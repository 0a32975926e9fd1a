"""HOPE: the sets that it chooses cost least together, with pairs and without, and whatever stays anyway stays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from locum.criteria.criterion import CRITERIA
from locum.methods.hope import HOPE, SOLVERS, Choice
from locum.methods.prune import Prune
from locum.plans.plan import DROPPED, LayerPlan
from making.handmade import layers_of, make_statistics, toy_shape, with_sums


def gone_of(layer: LayerPlan) -> tuple[int, ...]:
    return tuple(e for e, slot in enumerate(layer.slots) if slot == DROPPED)


def costs(seed: int, size: int = 9) -> np.ndarray:
    """Means over different tokens: symmetric, not below 0, not positive definite."""
    drawn = np.random.default_rng(seed).exponential(size=(size, size)) ** 2
    return drawn + drawn.T + np.diag(np.random.default_rng(seed + 100).exponential(size=size))


def choice(cost: np.ndarray, count: int, kept: tuple[int, ...] = (), groups: int = 1) -> Choice:
    stay = np.isin(np.arange(len(cost)), kept)
    return Choice(cost, count, stay, np.split(np.arange(len(cost)), groups))


def members(gone_E: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(gone_E).tolist())


def total(cost: np.ndarray, gone: tuple[int, ...]) -> float:
    return sum(cost[i][j] for i in gone for j in gone)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_solvers_against_all_sets(count: int) -> None:
    exact = 0
    for seed in range(12):
        cost = costs(seed)
        best = min(total(cost, s) for s in itertools.combinations(range(9), count))
        exchanged, relaxed = (members(SOLVERS[name](choice(cost, count))) for name in ("exchange", "relaxed"))
        assert len(exchanged) == len(relaxed) == count
        swaps = [
            tuple(sorted({*exchanged, new} - {old})) for old in exchanged for new in set(range(9)) - set(exchanged)
        ]
        assert total(cost, exchanged) <= min(total(cost, s) for s in swaps) + 1e-9
        exact += total(cost, exchanged) <= best + 1e-9
        assert total(cost, relaxed) >= best - 1e-9
    assert exact >= 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_pairs_the_smallest_go(solver: str) -> None:
    alone = np.random.default_rng(0).exponential(size=9)
    for count in range(9):
        assert members(SOLVERS[solver](choice(np.diag(alone), count))) == tuple(sorted(alone.argsort()[:count]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_kept_experts_stay_and_groups_give_equally_many(solver: str) -> None:
    cost = costs(3, 8)
    gone = members(SOLVERS[solver](choice(cost, 4, kept=(0, 5), groups=2)))
    assert len(gone) == 4 and sum(e < 4 for e in gone) == 2 and not {0, 5} & set(gone)
    if solver == "exchange":
        pairs = itertools.product(itertools.combinations((1, 2, 3), 2), itertools.combinations((4, 6, 7), 2))
        assert total(cost, gone) == pytest.approx(min(total(cost, one + two) for one, two in pairs))


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_that_do_little_alone_and_much_together_do_not_both_go(solver: str) -> None:
    """Experts 0 and 1 contribute least, always to the same tokens; pruning by each alone takes both."""
    shape = toy_shape(layers=1, experts=6, top_k=2)
    square = torch.diag(torch.tensor([10.0, 11, 20, 21, 40, 40]))
    square[0, 1] = square[1, 0] = 100.0
    count = torch.full((6, 6), 10.0)
    statistics = with_sums(
        shape,
        gated_norm_product=[square],
        co_count=[count],
        count=[torch.full((6,), 10.0)],
        gated_output_norm=[torch.arange(1.0, 7.0)],
        output_peak=[torch.ones(6)],
    )
    assert gone_of(layers_of(Prune(), statistics, shape, 0.5)[0]) == (0, 1)
    assert gone_of(layers_of(HOPE(solver=solver), statistics, shape, 0.5)[0]) == (0, 2)


def test_costs_are_means_over_the_tokens_that_both_got() -> None:
    shape = toy_shape(layers=2)
    statistics = make_statistics(shape)
    for layer, cost in zip(shape.layers, HOPE().score_experts(statistics, shape).cost_LEE, strict=True):
        named = statistics.layer(layer.name)
        for i, j in itertools.product(range(16), repeat=2):
            together = float(named["co_count"][i, j])
            assert cost[i, j] == pytest.approx(float(named["gated_norm_product"][i, j]) / together if together else 0)
        reap_E = CRITERIA["reap"](named).numpy()
        assert (np.diagonal(cost) >= reap_E**2 - 1e-9).all()  # a mean of squares is not below the square of the mean


def test_budgets_say_how_many() -> None:
    shape = toy_shape()
    statistics = make_statistics(shape)
    for budget in ("uniform", "global"):
        options = {"budget": budget, "floor": 5}
        pruned, chosen = (layers_of(m(**options), statistics, shape, 0.5) for m in (Prune, HOPE))
        assert [len(gone_of(layer)) for layer in chosen] == [len(gone_of(layer)) for layer in pruned]
