"""Counts per layer and ranks per expert: the published rule, a slow loop, and budgets that are never exceeded."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from locum.budgets.counts import COUNTS, bounded_shares, prune_counts, spare
from locum.budgets.ranks import allocate_ranks, break_even, rank_bounds, rank_shares, rank_step
from locum.shapes import ModelShape
from making.handmade import toy_shape


def test_the_published_rule() -> None:
    """floor((I + eps)^a / sum (I + eps)^a * R_a * M') with a = 0.15, without guards."""
    importance = [10, 5, 1, 0.1, 1e-3, 0]
    weights = [(value + 1e-6) ** 0.15 for value in importance]
    by_hand = [int(weight / sum(weights) * 512 * 6) for weight in weights]
    assert (rank_shares(torch.tensor(importance)) * 512 * 6).floor().tolist() == by_hand
    assert by_hand == [890, 802, 630, 446, 223, 79]
    steep = (rank_shares(torch.tensor(importance), exponent=1.0) * 512 * 6).floor().tolist()
    assert steep == [1907, 953, 190, 19, 0, 0]
    assert rank_shares(torch.tensor(importance), exponent=0).tolist() == [1 / 6] * 6


def slow_shares(weights: list[float], total: float, least: list[float], most: list[float]) -> list[float]:
    """clip(c w, least, most) with c by bisection."""
    low, high = 0.0, max(m / w for m, w in zip(most, weights, strict=True))
    for _ in range(200):
        c = (low + high) / 2
        clipped = [min(max(c * w, a), b) for w, a, b in zip(weights, least, most, strict=True)]
        low, high = (c, high) if sum(clipped) < total else (low, c)
    return clipped


@pytest.mark.parametrize("seed", range(30))
def test_bounded_shares_equal_a_bisection(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 12)
    weights = [rng.random() ** 4 + 1e-6 for _ in range(n)]
    least = [rng.choice([0.0, rng.random()]) for _ in range(n)]
    most = [a + rng.choice([0.0, 3 * rng.random()]) for a in least]
    total = sum(least) + rng.random() * (sum(most) - sum(least))
    wide = [torch.tensor(x, dtype=torch.float64) for x in (weights, least, most)]
    shares = bounded_shares(wide[0], total, *wide[1:])
    assert float(shares.sum()) == pytest.approx(total, abs=1e-9)
    torch.testing.assert_close(
        shares, torch.tensor(slow_shares(weights, total, least, most)).double(), atol=1e-6, rtol=0
    )


def slow_ranks(shares: list[float], total: int, least: int, dense: int, step: int) -> list[int]:
    """Clipped ideals by bisection, rounded down, then one step at a time to the largest remainder."""
    n = len(shares)
    if total >= n * dense:
        return [dense] * n
    ideal = slow_shares(shares, total, [least] * n, [dense] * n)
    ranks = [int(value / step + 1e-9) * step for value in ideal]
    remainder = [value - rank for value, rank in zip(ideal, ranks, strict=True)]
    while sum(ranks) + step <= total:
        e = max((e for e in range(n) if ranks[e] < dense), key=lambda e: (remainder[e], -e))
        ranks[e] += step
        remainder[e] -= step
    return ranks


@pytest.mark.parametrize("seed", range(60))
def test_ranks_keep_to_the_budget_and_equal_a_slow_loop(seed: int) -> None:
    rng = random.Random(seed)
    step = rng.choice([1, 4, 16])
    least, dense = step * rng.randint(1, 3), step * rng.randint(3, 60)
    n = rng.randint(1, 64)
    importance = torch.tensor([rng.random() ** rng.choice([1, 8]) * rng.choice([0, 1, 1, 100]) for _ in range(n)])
    shares = rank_shares(importance.double(), rng.choice([0, 0.15, 1]))
    total = rng.randint(n * least, n * dense)
    ranks = allocate_ranks(shares, total, least, dense, step)
    assert total - step < sum(ranks) <= total
    assert all(least <= rank <= dense and rank % step == 0 for rank in ranks)
    order = sorted(range(n), key=lambda e: float(shares[e]))
    assert all(ranks[a] <= ranks[b] + step for a, b in itertools.pairwise(order))
    assert ranks == slow_ranks(shares.tolist(), total, least, dense, step)


def test_a_budget_below_the_minimum_is_not_exceeded_either() -> None:
    ranks = allocate_ranks(rank_shares(torch.ones(4)), 100, 64, 128, 16)
    assert sum(ranks) == 96 and min(ranks) == 16 and max(ranks) == 32


def test_more_budget_never_means_less() -> None:
    shares = rank_shares(torch.rand(16, generator=torch.Generator().manual_seed(0)).double(), 0.5)
    sums = [sum(allocate_ranks(shares, total, 16, 96, 16)) for total in range(16 * 16, 16 * 96 + 1)]
    assert sums == sorted(sums) and sums[0] == 16 * 16 and sums[-1] == 16 * 96


def test_break_even_is_the_first_rank_that_saves_nothing() -> None:
    for d, f, expected in ((4096, 14336, 3186), (2048, 1408, 835), (2048, 1024, 683), (2048, 768, 559), (4, 4, 2)):
        layer = toy_shape(layers=1, d=d, f=f).layers[0]
        assert break_even(layer) == expected
        assert layer.adapter_parameters(expected) >= layer.parameters() > layer.adapter_parameters(expected - 1)


@pytest.mark.parametrize(
    ("d", "f", "minimum", "multiple", "bounds"),
    [
        (2048, 1408, 1, 16, (16, 848, 16)),
        (2048, 1408, 100, 16, (112, 848, 16)),
        (2048, 1408, 1, 1, (1, 835, 1)),
        (64, 64, 1, 16, (16, 32, 16)),
        (256, 63, 1, 16, (8, 56, 8)),
        (32, 16, 1, 16, (4, 12, 4)),
        (2, 2, 1, 16, (1, 1, 1)),  # nothing to gain: whole
        (32, 16, 100, 16, (12, 12, 4)),
    ],
)
def test_bounds_of_ranks(d: int, f: int, minimum: int, multiple: int, bounds: tuple[int, int, int]) -> None:
    layer = toy_shape(layers=1, d=d, f=f).layers[0]
    assert rank_bounds(layer, minimum, multiple) == bounds and rank_step(layer, multiple) == bounds[2]


# --- counts -------------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    """A quarter of 48 is 12."""
    shape = toy_shape(layers=3, experts=16)
    assert prune_counts([1, 2, 4], shape, 0.25, "inverse") == [7, 3, 2]  # 12 * 4/7, 2/7, 1/7 = 6.86, 3.43, 1.71
    assert prune_counts([1, 2, 4], shape, 0.25, "gap") == [7, 5, 0]  # 12 * 3/5, 2/5, 0
    assert prune_counts([1, 2, 4], shape, 0.25, "uniform") == [4, 4, 4]
    assert prune_counts([0, 0, 0], shape, 0.25, "inverse") == prune_counts([2, 2, 2], shape, 0.25, "gap") == [4, 4, 4]
    assert prune_counts([0, 1, 1], shape, 0.5, "inverse") == [14, 5, 5]  # all that it can spare, the rest as before
    assert prune_counts([1, 2, 4], shape, 0.0, "inverse") == [0, 0, 0]


@pytest.mark.parametrize("policy", COUNTS)
@pytest.mark.parametrize("seed", range(20))
def test_counts_add_up_and_keep_to_what_layers_can_spare(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    groups = rng.choice([1, 1, 4])
    shape = toy_shape(layers=rng.randint(1, 6), experts=16, top_k=rng.choice([2, 8]), num_groups=groups)
    layers = [dataclasses.replace(x, refuse_dropping=rng.choice(["", "", "why"])) for x in shape.layers]
    shape = dataclasses.replace(shape, layers=tuple(layers))
    importance = [rng.random() ** 3 for _ in layers]
    share = rng.random() * 0.95
    counts = prune_counts(importance, shape, share, policy)
    can = sum(0 if x.refuse_dropping else spare(x) for x in layers)
    wanted = min(round(share * 16 * len(layers)), can)
    assert wanted - groups < sum(counts) <= wanted
    for count, layer in zip(counts, layers, strict=True):
        assert count % groups == 0 and 0 <= count <= (0 if layer.refuse_dropping else spare(layer))
    if policy != "uniform":
        free = [(i, n) for i, n, x in zip(importance, counts, layers, strict=True) if not x.refuse_dropping]
        assert all(one[1] >= two[1] - groups for one in free for two in free if one[0] < two[0])


def test_layers_of_different_sizes_give_in_proportion() -> None:
    small, large = toy_shape(layers=1, experts=8), toy_shape(layers=1, experts=24)
    both = ModelShape("toy", (*small.layers, *large.layers), 1, 1, 2)
    assert prune_counts([1, 1], both, 0.25, "uniform") == [2, 6]
