"""Guards of a choice, against every choice that there is."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from locum.budgets.choosing import Choices, choose
from locum.budgets.guards import SLACK, lost, with_floors, without_dead_ends

NOTHING = 2


def some_layers(seed: int, experts: int = 4) -> list[Choices]:
    """Whole, half, and nothing, in two layers."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(2):
        cost_EC = draw.exponential(size=(experts, 3)) * np.array([0, 0.5, 2])
        size_C = np.array([16.0, 7.0, 0.0])
        none_EC, none_H = np.full(cost_EC.shape, -1), np.zeros(0)
        found.append(Choices(cost_EC, size_C, none_EC, none_H, none_H, np.zeros(3, bool), 0))
    return found


def within(budget: float):
    return functools.partial(choose, budget=budget)


@pytest.mark.parametrize("seed", range(4))
def test_no_more_become_nothing_than_may_and_the_cost_is_near_the_best(seed: int) -> None:
    layers = some_layers(seed)
    budget, most = 8 * 7.0 - 4 * 7, [1, 2]
    free, guarded = within(budget)(layers), without_dead_ends(within(budget), NOTHING, most)(layers)
    counts = [int((choice.candidate_E == NOTHING).sum()) for choice in guarded.layers]
    assert max((x.candidate_E == NOTHING).sum() - m for x, m in zip(free.layers, most, strict=True)) > 0
    smallest = sum(7.0 * (4 - m) for m in most)
    assert smallest > budget and guarded.bytes == smallest and counts == most  # nothing smaller is allowed
    for budget in (38.0, 45.0, 60.0):
        guarded = without_dead_ends(within(budget), NOTHING, most)(layers)
        assert all((x.candidate_E == NOTHING).sum() <= m for x, m in zip(guarded.layers, most, strict=True))
        best = np.inf
        for picks in itertools.product(range(3), repeat=8):
            ok = all(picks[4 * i : 4 * i + 4].count(NOTHING) <= m for i, m in enumerate(most))
            if ok and sum(layers[0].bytes_C[c] for c in picks) <= budget:
                best = min(best, sum(layers[i // 4].cost_EC[i % 4, c] for i, c in enumerate(picks)))
        assert guarded.bytes <= budget and best - 1e-9 <= guarded.cost <= 1.4 * best + 1e-9


def test_one_that_can_be_nothing_else_stays_nothing() -> None:
    layers = some_layers(0)
    layers[0].cost_EC[:, :2] = np.inf
    guarded = without_dead_ends(within(100.0), NOTHING, [0, 0])(layers)
    assert (guarded.layers[0].candidate_E == NOTHING).all() and not (guarded.layers[1].candidate_E == NOTHING).any()


def shares(layers: list[Choices]) -> list[dict[str, np.ndarray]]:
    """One domain in a tenth of the text, which uses the last expert of each layer alone, and another in the rest, which uses the others."""
    own = np.array([0.0, 0.0, 0.0, 10.0])
    return [{"rare": own, "usual": (1 - 0.1 * own) / 0.9} for _ in layers]


@pytest.mark.parametrize("seed", range(4))
def test_a_protected_domain_loses_little_more_than_it_must(seed: int) -> None:
    layers, budget = some_layers(seed), 60.0
    for layer in layers:
        layer.cost_EC[3] *= 0.05  # rare text weighs little in all text together
    share_L = shares(layers)
    free = within(budget)(layers)
    least = min(
        sum(10 * layers[i].cost_EC[3, c] for i, c in enumerate(pick)) for pick in itertools.product(range(3), repeat=2)
    )  # enough bytes for two whole experts: nothing
    assert least == 0 and lost(layers, free, share_L, "rare") > 0
    kept = with_floors(within(budget), share_L, ["rare"])(layers)
    assert lost(layers, kept, share_L, "rare") <= (1 + SLACK) * least + 1e-9
    assert kept.bytes <= budget and kept.cost >= free.cost
    true = sum(layers[i].cost_EC[np.arange(4), choice.candidate_E].sum() for i, choice in enumerate(kept.layers))
    assert kept.cost == pytest.approx(true)


def test_domains_that_need_the_same_bytes_share_them() -> None:
    """Both cannot have what is least for each: neither is left with all of the loss."""
    layers = some_layers(3)
    a, b = np.array([4.0, 0, 0, 0]), np.array([0, 4.0, 0, 0])
    for layer in layers:
        layer.cost_EC[:] = np.array([0.0, 0.5, 1.0])
    share_L = [{"a": a, "b": b, "c": 4.0 - a - b} for _ in layers]
    budget = 24.0  # two whole, of the four that both use
    kept = with_floors(within(budget), share_L, ["a", "b"])(layers)
    loss = [lost(layers, kept, share_L, name) for name in ("a", "b")]
    assert max(loss) < 8.0 and kept.bytes <= budget  # 8: all of one domain's experts are nothing


def test_without_protected_domains_the_choice_is_as_it_was() -> None:
    pick = within(40.0)
    assert with_floors(pick, [], ()) is pick
