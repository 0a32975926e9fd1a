"""One candidate for every expert within a budget, against every choice that there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from locum.budgets.choosing import Choices, choose, choose_alike

EXPERTS, CANDIDATES = 3, 5


def some_layers(seed: int, layers: int = 2, experts: int = EXPERTS) -> list[Choices]:
    """Candidate 0 is whole and costs nothing; of the last two, one needs a shared thing and one leaves the layer."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        cost_EC = draw.exponential(size=(experts, CANDIDATES)) * np.array([0, 1, 2, 1, 3])
        cost_EC[draw.integers(experts), 1] = np.inf
        size_C = np.array([16.0, *draw.integers(4, 12, 2), 2, -1])
        gone_C, one_H = np.array([False] * 4 + [True]), np.array([0])
        found.append(
            Choices(cost_EC, size_C, of_candidates([-1, -1, -1, 0, -1], experts), 6.0 + one_H, one_H, gone_C, 1)
        )
    return found


def of_candidates(shared: list[int], experts: int) -> np.ndarray:
    return np.tile(np.array(shared), (experts, 1))


def with_groups(seed: int, most_gone: int) -> list[Choices]:
    """Four experts and two ways to group them: all together, and in two pairs, with a base each. The last candidate leaves."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(2):
        cost_EC = draw.exponential(size=(4, CANDIDATES)) * np.array([0, 1, 1, 1, 2])
        shared_EC = np.array([[-1, -1, 0, 1 + e // 2, -1] for e in range(4)])
        size_C, size_H = np.array([16.0, 9, 2, 1, -1]), draw.integers(3, 12, 3).astype(float)
        gone_C = np.array([False] * 4 + [True])
        found.append(Choices(cost_EC, size_C, shared_EC, size_H, np.array([0, 1, 1]), gone_C, most_gone))
    return found


def every_choice(layers: list[Choices]) -> list[tuple[float, float]]:
    """Cost and bytes of every choice that is allowed, by loops alone."""
    of_layers = []
    for layer in layers:
        experts, count = layer.cost_EC.shape
        found = []
        for picks in itertools.product(range(count), repeat=experts):
            if sum(bool(layer.gone_C[c]) for c in picks) > layer.most_gone:
                continue
            shared = {int(layer.shared_EC[e, c]) for e, c in enumerate(picks)} - {-1}
            cost = sum(float(layer.cost_EC[e, c]) for e, c in enumerate(picks))
            size = sum(float(layer.bytes_C[c]) for c in picks) + sum(float(layer.bytes_H[s]) for s in shared)
            if len({int(layer.set_H[h]) for h in shared}) <= 1 and cost < np.inf:
                found.append((cost, size))
        of_layers.append(found)
    return [tuple(map(sum, zip(*pair, strict=True))) for pair in itertools.product(*of_layers)]


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_or_as_near_as_it_says(seed: int) -> None:
    layers = some_layers(seed)
    every = every_choice(layers)
    exact = 0
    budgets = np.linspace(min(size for _, size in every), 90, 9)
    for budget in budgets:
        best = min(cost for cost, size in every if size <= budget)
        chosen = choose(layers, float(budget))
        assert chosen.bytes <= budget and (round(chosen.cost, 9), chosen.bytes) in {(round(c, 9), s) for c, s in every}
        assert chosen.bound <= best + 1e-9 <= chosen.cost + 2e-9
        exact += chosen.cost <= best + 1e-9
    assert exact >= 5  # the others are within what the bound says


@pytest.mark.parametrize("most_gone", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_of_several_bases_those_are_taken_that_pay(seed: int, most_gone: int) -> None:
    layers = with_groups(seed, most_gone)
    every = np.array(every_choice(layers))
    budgets, exact, used = np.linspace(every[:, 1].min(), 120, 12), 0, set()
    for budget in budgets:
        best = every[every[:, 1] <= budget, 0].min()
        chosen = choose(layers, float(budget))
        assert chosen.bytes <= budget and (np.abs(every - [chosen.cost, chosen.bytes]).max(1) < 1e-9).any()
        assert chosen.bound <= best + 1e-9 <= chosen.cost + 2e-9
        exact += chosen.cost <= 1.1 * best + 1e-9
        used |= {choice.shared for choice in chosen.layers}
    assert exact >= 7 and any(set(shared) & {1, 2} for shared in used)


def test_of_many_experts_the_choice_is_near_the_bound() -> None:
    layers = some_layers(7, layers=4, experts=64)
    for budget in (1000.0, 2500.0):
        chosen = choose(layers, budget)
        assert budget - 16 < chosen.bytes <= budget
        assert chosen.bound <= chosen.cost <= 1.005 * chosen.bound + 1e-9


def test_room_for_all_keeps_all_and_no_room_gives_the_smallest() -> None:
    layers = some_layers(1)
    whole = choose(layers, 16.0 * EXPERTS * 2)
    assert whole.cost == 0 and all((choice.candidate_E == 0).all() for choice in whole.layers)
    smallest = choose(layers, -100.0)
    assert smallest.bytes == min(size for _, size in every_choice(layers)) and smallest.bound == np.inf
    assert all((choice.candidate_E == CANDIDATES - 1).sum() <= 1 for choice in smallest.layers)


def test_costs_that_are_all_nothing_are_no_trouble() -> None:
    none_EC, none_H = of_candidates([-1, -1], 4), np.zeros(0)
    layers = [Choices(np.zeros((4, 2)), np.array([8.0, 2.0]), none_EC, none_H, none_H, np.zeros(2, bool), 0)]
    assert choose(layers, 20.0).bytes <= 20 and choose(layers, 32.0).bytes == 32


@pytest.mark.parametrize("seed", range(3))
def test_alike_in_all_layers_the_choice_is_the_best_of_all(seed: int) -> None:
    """By loops: one candidate for all that stay, equally many gone of every layer."""
    layers, beside = some_layers(seed, experts=4), (2.0, 0.5)
    every = []
    for stay in range(3):  # of the last two one needs a shared thing, one leaves
        for count in range(3):
            cost, size = 0.0, -(beside[0] + count * beside[1] if count else 0.0)
            for layer in layers:
                experts = range(len(layer.cost_EC))
                cost += min(
                    sum(float(layer.cost_EC[e, 4 if e in gone else stay]) for e in experts)
                    for gone in itertools.combinations(experts, count)
                )
                size += (len(experts) - count) * layer.bytes_C[stay] + count * layer.bytes_C[4]
            every.append((cost, size))
    for budget in np.linspace(min(size for _, size in every), 130, 12):
        chosen = choose_alike(layers, float(budget), 2, beside)
        best = min(cost for cost, size in every if size <= budget and np.isfinite(cost))
        assert chosen.cost == pytest.approx(best) and chosen.bound == chosen.cost
        counts = {int((choice.candidate_E == 4).sum()) for choice in chosen.layers}
        assert len(counts) == 1 and len({c for x in chosen.layers for c in x.candidate_E.tolist()} - {4}) == 1
    smallest = choose_alike(layers, -100.0, 2, beside)
    assert smallest.bound == np.inf and smallest.bytes < 130
