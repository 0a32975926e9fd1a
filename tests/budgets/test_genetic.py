"""The search over sets against trying all of them, and the choice in a block against the planted best combination."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from locum.budgets.sets import choose_in_block, removed_mask, search_sets
from locum.errors import StatisticsError

SMALL = {"population": 40, "generations": 25}  # 1000 sets at most: fewer than the spaces below


class Errors:
    """An error of every set: a sum over its members, and what pairs of them add or spare. Counts what it is asked."""

    def __init__(self, num_experts: int, seed: int, pairs: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.single_E = torch.rand(num_experts, generator=generator, dtype=torch.float64)
        self.pair_EE = pairs * torch.randn(num_experts, num_experts, generator=generator, dtype=torch.float64)
        self.single, self.pair = self.single_E.tolist(), self.pair_EE.tolist()
        self.asked: list[tuple[int, ...]] = []
        self.calls = 0

    def __call__(self, removed_CE: Tensor) -> Tensor:
        self.calls += 1
        self.asked += [tuple(row.nonzero().flatten().tolist()) for row in removed_CE]
        x_CE = removed_CE.double()
        return x_CE @ self.single_E + ((x_CE @ self.pair_EE) * x_CE).sum(dim=1)

    def of(self, members: tuple[int, ...]) -> float:
        return sum(self.single[i] + sum(self.pair[i][j] for j in members) for i in members)


def brute_force(errors: Errors, num_experts: int, count: int, groups: int = 1) -> list[tuple[int, ...]]:
    size = num_experts // groups
    sets = [
        s
        for s in itertools.combinations(range(num_experts), count)
        if all(sum(e // size == g for e in s) == count // groups for g in range(groups))
    ]
    return sorted(sets, key=lambda s: (errors.of(s), s))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("pairs", "groups"), [(0.0, 1), (0.3, 1), (0.0, 2), (0.3, 2)])
def test_search_finds_what_brute_force_finds(seed: int, pairs: float, groups: int) -> None:
    errors = Errors(16, seed, pairs)
    best = brute_force(errors, 16, 6, groups)
    assert len(best) > 1000
    found = search_sets(16, 6, errors, keep=3, num_groups=groups, seed=seed, **SMALL)
    assert found[0][0] == best[0]
    assert len(errors.asked) <= 40 + 25 * 32 < len(best)
    for members, error in found:
        assert error == pytest.approx(errors.of(members))
    assert [error for _, error in found] == sorted(error for _, error in found)


@pytest.mark.parametrize(("experts", "count", "groups"), [(8, 2, 1), (8, 4, 2), (8, 4, 4), (6, 0, 1), (10, 3, 1)])
def test_small_spaces_are_tried_whole(experts: int, count: int, groups: int) -> None:
    errors = Errors(experts, 1, 0.3)
    best = brute_force(errors, experts, count, groups)
    found = search_sets(experts, count, errors, keep=5, num_groups=groups, **SMALL)
    assert [members for members, _ in found] == best[:5]
    assert sorted(errors.asked) == sorted(best)


def test_every_set_is_evaluated_once_and_a_generation_at_a_time() -> None:
    errors = Errors(32, 0, 0.2)
    search_sets(32, 8, errors, seed=1, **SMALL)
    assert len(errors.asked) == len(set(errors.asked)) and errors.calls <= 26
    assert {len(members) for members in errors.asked} == {8}


def test_the_same_seed_gives_the_same_result_and_another_one_another_search() -> None:
    one, two, other = Errors(32, 0, 0.2), Errors(32, 0, 0.2), Errors(32, 0, 0.2)
    assert search_sets(32, 8, one, seed=1, **SMALL) == search_sets(32, 8, two, seed=1, **SMALL)
    assert one.asked == two.asked
    search_sets(32, 8, other, seed=2, **SMALL)
    assert one.asked != other.asked


def test_groups_give_equally_many_in_the_search_too() -> None:
    errors = Errors(32, 0, 0.2)
    search_sets(32, 8, errors, num_groups=4, seed=1, **SMALL)
    assert all([sum(e // 8 == g for e in s) for g in range(4)] == [2] * 4 for s in errors.asked)


def test_searching_is_better_than_drawing_as_many_sets() -> None:
    errors = Errors(48, 3, 0.2)
    found = search_sets(48, 12, errors, seed=0, **SMALL)
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randperm(48, generator=generator)[:12].tolist()) for _ in errors.asked]
    assert found[0][1] < min(map(errors.of, drawn)) - 1


def test_ties_go_to_the_first_set() -> None:
    found = search_sets(6, 2, lambda removed_CE: torch.zeros(len(removed_CE)), keep=3, **SMALL)
    assert [members for members, _ in found] == [(0, 1), (0, 2), (0, 3)]


def test_errors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(StatisticsError, match="not finite"):
        search_sets(6, 2, lambda removed_CE: torch.full((len(removed_CE),), math.nan))


def test_masks() -> None:
    assert removed_mask([(), (0, 2)], 3).tolist() == [[False] * 3, [True, False, True]]


# --- blocks -------------------------------------------------------------------------------------------------------

LAYERS = {"a": 4, "b": 5, "c": 4}
CANDIDATES = {"a": [(0,), (1,), (3,)], "b": [(0, 1), (2, 4)], "c": [(2,), (3,)]}


def test_a_planted_combination_is_found() -> None:
    planted = {"a": (3,), "b": (0, 1), "c": (3,)}
    asked = []

    def error(candidates: list[dict[str, Tensor]]) -> Tensor:
        for masks in candidates:
            assert {name: len(mask) for name, mask in masks.items()} == LAYERS
            asked.append({name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()})
        return torch.tensor(
            [sum(asked[-1 - i][n] != planted[n] for n in planted) for i in range(len(candidates))]
        ).flip(0)

    assert choose_in_block(CANDIDATES, LAYERS, error) == planted
    assert len(asked) == 3 * 2 * 2 and all(one not in asked[i + 1 :] for i, one in enumerate(asked))


def test_one_candidate_each_is_the_best_of_the_search_and_needs_no_error() -> None:
    firsts = {name: sets[:1] for name, sets in CANDIDATES.items()}
    assert choose_in_block(firsts, LAYERS, None) == {name: sets[0] for name, sets in CANDIDATES.items()}


def test_equal_combinations_go_to_the_better_candidates() -> None:
    chosen = choose_in_block(CANDIDATES, LAYERS, lambda candidates: torch.ones(len(candidates)))
    assert chosen == {name: sets[0] for name, sets in CANDIDATES.items()}
