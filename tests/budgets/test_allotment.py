"""The exact choice of counts against brute force, every registered budget, and the limits that serving engines ask for."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import re

import numpy as np
import pytest
import torch

from locum.budgets.allotment import cheapest, cheapest_of_few
from locum.budgets.budget import BUDGETS, Limits, budget, taken
from locum.budgets.counts import most_to_lose
from locum.budgets.ranking import Ranking, ranking
from locum.errors import OptionError
from locum.methods.prune import Prune
from locum.shapes import ModelShape
from making.handmade import make_statistics, toy_shape

ALL = tuple(BUDGETS)
AMOUNTS = (0.0, 0.1, 0.3, 0.55, 0.8, 1.0)
ANY = Limits()


def costs(seed: int, sizes: tuple[int, ...] = (5, 4, 6)) -> list[np.ndarray]:
    """Of layers that may lose up to so many experts; some numbers are forbidden, some costs below 0."""
    draw = np.random.default_rng(seed)
    found = [draw.normal(size=size).round(2) + 0.5 * np.arange(size) for size in sizes]
    for cost_X in found:
        cost_X[draw.integers(1, len(cost_X))] = np.inf
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_counts_equal_brute_force(seed: int) -> None:
    cost_LX = costs(seed)
    every = [c for c in itertools.product(*(range(len(x)) for x in cost_LX)) if math.isfinite(price(cost_LX, c))]
    most = max(map(sum, every))
    for least in range(most + 3):
        best = min(price(cost_LX, c) for c in every if sum(c) >= min(least, most))
        found = cheapest(cost_LX, least)
        assert sum(found) >= min(least, most) and price(cost_LX, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_the_cheapest_of_few_numbers_equal_brute_force(seed: int, distinct: int) -> None:
    cost_LX, experts_L = costs(seed), [6, 5, 8]

    def kept(c: tuple[int, ...]) -> int:
        return len({experts - n for experts, n in zip(experts_L, c, strict=True)})

    every = [c for c in itertools.product(*(range(len(x)) for x in cost_LX)) if math.isfinite(price(cost_LX, c))]
    every = [c for c in every if kept(c) <= distinct]
    if not every:
        pytest.skip("no number is allowed in all layers")
    for least in (0, 4, 99):
        reached = min(least, max(map(sum, every)))
        best = min(price(cost_LX, c) for c in every if sum(c) >= reached)
        found = cheapest_of_few(cost_LX, experts_L, least, distinct)
        assert kept(tuple(found)) <= distinct and sum(found) >= reached
        assert price(cost_LX, found) == pytest.approx(best)


def price(cost_LX: list[np.ndarray], counts: tuple[int, ...] | list[int]) -> float:
    return float(sum(cost_X[n] for cost_X, n in zip(cost_LX, counts, strict=True)))


# --- every registered budget ----------------------------------------------------------------------------------------

small = functools.partial(toy_shape, d=16, f=8)
SHAPES = {
    "plain": small(),
    "groups": small(layers=2, num_groups=4, min_per_group=2),
    "tight": small(layers=2, experts=8, top_k=7),
}
seen = functools.cache(make_statistics)


def ranked(shape: ModelShape, floor: int = 0) -> Ranking:
    return ranking(seen(shape, 1), shape, "reap", protect=False, floor=floor)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_counts_are_ones_that_a_plan_may_have_and_grow_with_the_amount(name: str, shape: ModelShape) -> None:
    found = [BUDGETS[name].counts(ranked(shape, floor=5), shape, amount) for amount in AMOUNTS]
    assert found == [BUDGETS[name].counts(ranked(shape, floor=5), shape, amount) for amount in AMOUNTS]
    for counts in found:
        for count, layer in zip(counts, shape.layers, strict=True):
            assert 0 <= count <= most_to_lose(layer, floor=5) and count % layer.num_groups == 0
    totals = list(map(sum, found))
    assert totals == sorted(totals) and totals[0] == 0
    assert totals[-1] == sum(most_to_lose(layer, floor=5) for layer in shape.layers)


@pytest.mark.parametrize("name", ALL)
def test_every_method_takes_every_budget_and_says_what_it_needs(name: str) -> None:
    assert set(BUDGETS[name].needs) <= set(Prune(budget=name).needs())
    text = inspect.getdoc(BUDGETS[name].counts)
    assert text and re.fullmatch(r"arXiv \d{4}\.\d{5} \([^()]+\)|no paper \([^()]+\)", BUDGETS[name].paper)


def test_an_unknown_budget_lists_close_ones() -> None:
    with pytest.raises(OptionError, match="unknown budget 'globall': did you mean 'global'"):
        Prune(budget="globall").needs()


def test_registering_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="registered twice"):
        budget("uniform", paper="x")(lambda ranking, shape, amount: [])


def test_the_measured_budget_takes_where_the_loss_grows_least() -> None:
    """Layer 0 loses nothing up to four experts and much then; the others lose a little each."""
    shape = small(layers=3, experts=8, top_k=2)
    statistics = make_statistics(shape)
    curves = [[0, 0, 0, 0, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6, 6, 6], [1, 2, 3, 4, 5, 6, 6, 6]]
    for layer, curve in zip(shape.layers, curves, strict=True):
        statistics.layers[layer.name]["loss_curve"] = torch.tensor([curve, [0] * 8], dtype=torch.float64)
    given = ranking(statistics, shape, "reap", protect=False)
    assert BUDGETS["measured"].counts(given, shape, 4 / 18) == [4, 0, 0]
    assert BUDGETS["measured"].counts(given, shape, 10 / 18) == [4, 6, 0]  # equal sums: the earlier layer


def test_a_threshold_over_all_layers_empties_those_with_small_scores_and_a_floor_holds_them() -> None:
    shape = small(layers=2, experts=8, top_k=2)
    scores = [torch.arange(1.0, 9), 100 * torch.arange(1.0, 9)]
    statistics = make_statistics(shape)
    for layer, scores_E in zip(shape.layers, scores, strict=True):
        statistics.layers[layer.name]["gate_sum"] = torch.stack([scores_E, scores_E]).double()
        statistics.layers[layer.name]["removal_loss"] = torch.stack([scores_E, scores_E]).double()
    counts = {}
    for name, floor in (("threshold", 0), ("global", 0), ("threshold", 5)):
        given = ranking(statistics, shape, "removal_loss", protect=False, floor=floor)
        counts[name, floor] = BUDGETS[name].counts(given, shape, 0.5)
    assert counts == {("threshold", 0): [6, 0], ("global", 0): [3, 3], ("threshold", 5): [3, 0]}


# --- limits and protection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [Limits(multiple=4), Limits(distinct=1), Limits(multiple=2, distinct=2)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_limits_hold_and_as_many_go(name: str, limits: Limits) -> None:
    shape = small(layers=4)
    given = ranked(shape)
    for amount in (0.3, 0.8, 1.0):
        asked = BUDGETS[name].counts(given, shape, amount)
        kept = [16 - len(gone) for gone in taken(name, given, shape, amount, limits)]
        assert all(n % limits.multiple == 0 and n >= 2 for n in kept)
        assert len(set(kept)) <= (limits.distinct or 4)
        reachable = 4 * max(n for n in range(15) if (16 - n) % limits.multiple == 0)
        assert 4 * 16 - sum(kept) >= min(sum(asked), reachable)


def test_a_multiple_that_no_layer_can_keep_is_refused() -> None:
    shape = small(layers=1)
    with pytest.raises(OptionError, match=r"--multiple is 17, and model\.layers\.0\.experts keeps 2 to 16 experts"):
        taken("uniform", ranked(shape), shape, 0.5, Limits(multiple=17))


def test_what_is_protected_stays_and_others_go_in_its_place() -> None:
    shape = small(layers=4)
    statistics = make_statistics(shape, 1)
    worst = int(statistics.layer(shape.layers[1].name)["gated_output_norm"].argmin())
    statistics.layers[shape.layers[1].name]["output_peak"][0, worst] = 1e4
    plain = ranking(statistics, shape, "weighted_ean", protect=False)
    safe = ranking(statistics, shape, "weighted_ean", protect=True)
    for name in ("uniform", "global", "importance", "adaptive", "measured"):
        gone, left = (taken(name, given, shape, 0.4, ANY)[1] for given in (plain, safe))
        assert worst in gone and worst not in left
    full = taken("uniform", safe, shape, 1.0, ANY)
    assert [len(gone) for gone in full] == [14] * 4 and worst not in full[1]


def test_protection_leaves_groups_even() -> None:
    shape = small(layers=1, experts=8, top_k=2, num_groups=2, min_per_group=1)
    (layer,) = shape.layers
    assert [most_to_lose(layer, kept) for kept in ((), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 4))] == [
        6,
        6,
        4,
        2,
        0,
        6,
    ]
    assert most_to_lose(layer, floor=5) == 2 and most_to_lose(dataclasses.replace(layer, num_groups=1), floor=5) == 3
