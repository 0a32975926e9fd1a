"""How much: sizes in words, the plan that meets a target, counts per layer, against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from locum.budgets.counts import global_counts, lowest, spare, uniform_counts
from locum.budgets.target import Target, check_met, meet_target, parse_size
from locum.errors import OptionError, PlanError
from locum.methods import METHODS
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Plan, make_plan
from locum.shapes import ModelShape
from locum.stages.planning import decide
from making.handmade import make_statistics, toy_shape


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        (456, 456),
        ("7B", 7),
        ("1.5kB", 1500),
        ("900MB", 900 * 10**6),
        ("2 GB", 2 * 10**9),
        ("1.5TB", 1500 * 10**9),
        (" 16GiB ", 16 * 2**30),
        ("0.5 gib", 2**29),
        ("1KiB", 1024),
        ("3 MiB", 3 * 2**20),
        ("1TiB", 2**40),
        (".5KiB", 512),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "16 G B", "16Gigs", "1.2.3GB", "nan", "inf", "1,000", -5])
def test_sizes_that_cannot_be_read(text: str | int) -> None:
    with pytest.raises(OptionError, match=r"cannot read size .*16GiB"):
        parse_size(text)


# --- search -----------------------------------------------------------------------------------------------------

SHAPE = toy_shape(layers=3, experts=8, d=16, f=8)


def dropping(shape: ModelShape, counts: list[int]) -> Plan:
    return make_plan(
        shape,
        [
            LayerPlan(layer.name, tuple(DROPPED if e < n else KEPT for e in range(layer.num_experts)))
            for layer, n in zip(shape.layers, counts, strict=True)
        ],
    )


def uniform(shape: ModelShape):
    return lambda amount: dropping(shape, uniform_counts(shape, amount))


@pytest.mark.parametrize("remove", [0.01, 0.06, 0.07, 0.2, 0.25, 0.3, 0.32, 0.5, 0.55, 0.62, 0.7, 0.75, 0.78])
def test_remove_takes_the_nearest_step(remove: float) -> None:
    """8 experts with top-2: 0 to 6 of 8 can go from every layer at once."""
    removed = meet_target(uniform(SHAPE), SHAPE, Target(remove=remove)).removed(SHAPE)
    assert abs(removed - remove) == pytest.approx(min(abs(n / 8 - remove) for n in range(7)), abs=1e-9)


def test_fit_takes_the_largest_that_fits() -> None:
    sizes = [dropping(SHAPE, [n] * 3).size(SHAPE).bytes for n in range(7)]
    for limit in [*sizes, *(size + 1 for size in sizes), *(size - 1 for size in sizes[:-1])]:
        size = meet_target(uniform(SHAPE), SHAPE, Target(fit=limit)).size(SHAPE).bytes
        assert size == max(s for s in sizes if s <= limit)


def test_a_model_that_fits_stays_whole() -> None:
    assert meet_target(uniform(SHAPE), SHAPE, Target(fit=SHAPE.bytes)).removed(SHAPE) == 0


@pytest.mark.parametrize("remove", [0, 1, -0.5, 1.5, 50, math.nan, math.inf])
def test_remove_out_of_range(remove: float) -> None:
    with pytest.raises(OptionError, match=r"--remove is .*above 0, below 1"):
        meet_target(uniform(SHAPE), SHAPE, Target(remove=remove))


@pytest.mark.parametrize("target", [{}, {"remove": 0.5, "fit": 10}])
def test_exactly_one_target(target: dict) -> None:
    with pytest.raises(OptionError, match="exactly one of --remove"):
        Target(**target)


def test_out_of_reach_says_the_best_there_is() -> None:
    with pytest.raises(PlanError, match=r"--remove 0\.9 is out of reach: .* remove 0\.7500 of the expert parameters"):
        meet_target(uniform(SHAPE), SHAPE, Target(remove=0.9))
    smallest = dropping(SHAPE, [6] * 3).size(SHAPE).bytes
    assert meet_target(uniform(SHAPE), SHAPE, Target(fit=smallest)).size(SHAPE).bytes == smallest
    with pytest.raises(PlanError, match=rf"--fit {smallest - 1:,} bytes is out of reach: .*{smallest:,} bytes .*GiB"):
        meet_target(uniform(SHAPE), SHAPE, Target(fit=smallest - 1))


def test_a_plan_made_for_a_target_is_checked_as_one_that_was_searched() -> None:
    half = dropping(SHAPE, [4] * 3)
    for target in (Target(0.5), Target(0.55), Target(0.45), Target(fit=half.size(SHAPE).bytes)):
        assert check_met(half, SHAPE, target) is half
    with pytest.raises(PlanError, match=r"--remove 0\.6 is out of reach: .* remove 0\.5000 of the expert parameters"):
        check_met(half, SHAPE, Target(0.6))
    with pytest.raises(PlanError, match=r"--remove 0\.4 is too little for this method: the least .* 0\.5000"):
        check_met(half, SHAPE, Target(0.4))
    with pytest.raises(PlanError, match=r"--fit [0-9,]+ bytes is out of reach"):
        check_met(half, SHAPE, Target(fit=half.size(SHAPE).bytes - 1))


def test_what_a_target_saves() -> None:
    assert Target(0.25).saving(SHAPE) == 0.25 * SHAPE.expert_parameters * SHAPE.expert_itemsize
    assert (Target(fit=SHAPE.bytes - 7).saving(SHAPE), Target(fit=2 * SHAPE.bytes).saving(SHAPE)) == (7, 0)


def test_just_beyond_the_best_gives_the_best() -> None:
    """Half a step of one expert is as near as a step can be."""
    assert meet_target(uniform(SHAPE), SHAPE, Target(remove=0.75 + 0.06)).removed(SHAPE) == 0.75
    with pytest.raises(PlanError, match="out of reach"):
        meet_target(uniform(SHAPE), SHAPE, Target(remove=0.75 + 0.07))


# A layer's first expert brings the factor that all share; a decoder layer goes as a whole, so that two of three can.
COARSE = {"moe-svd": 0.6 / 16, "block-drop": 0.5 / 3}


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].saves == "stored"])
def test_methods_hit_targets(method: str) -> None:
    """With 3 layers and 16 experts, a step is at most one expert in each layer, or a whole one."""
    shape = toy_shape()
    statistics = make_statistics(shape)
    chosen = METHODS[method]()
    for remove in (0.15, 0.3, 0.5):
        removed = decide(chosen, statistics, shape, Target(remove)).removed(shape)
        assert abs(removed - remove) <= COARSE.get(method, 0.5 / 16) + 1e-9
    limit = int(0.7 * shape.bytes)
    size = decide(chosen, statistics, shape, Target(fit=limit)).size(shape).bytes
    step = 16 * shape.layers[0].parameters() + 500 if method == "block-drop" else 3 * shape.layers[0].parameters()
    assert limit - 2 * step <= size <= limit


# --- counts -----------------------------------------------------------------------------------------------------


def test_uniform_counts() -> None:
    shape = toy_shape(layers=2, experts=16, top_k=4)
    assert [uniform_counts(shape, a)[0] for a in (0, 0.08, 1 / 12, 0.5, 0.99, 1)] == [0, 0, 1, 6, 11, 12]
    grouped = toy_shape(layers=1, experts=16, top_k=4, num_groups=4, min_per_group=2)
    assert [uniform_counts(grouped, a)[0] for a in (0, 0.49, 0.5, 0.99, 1)] == [0, 0, 4, 4, 8]


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "least", "spared"),
    [
        (8, 2, 1, 1, 6),
        (8, 8, 1, 1, 0),
        (8, 1, 1, 1, 7),
        (8, 2, 2, 1, 6),
        (8, 2, 2, 2, 4),
        (16, 6, 4, 1, 8),
        (16, 6, 4, 3, 4),
    ],
)
def test_spare(experts: int, top_k: int, groups: int, least: int, spared: int) -> None:
    layer = toy_shape(1, experts, top_k, num_groups=groups, min_per_group=least).layers[0]
    assert spare(layer) == spared


def test_lowest() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 5.0, 1.0, 9.0])
    assert lowest(scores, 0) == ()
    assert lowest(scores, 1) == (4,)
    assert lowest(scores, 2) == (1, 4) and lowest(scores, 3) == (1, 3, 4)  # ties: the lower index goes first
    assert lowest(scores, 8) == tuple(range(8))
    assert lowest(scores, 2, num_groups=2) == (1, 4) and lowest(scores, 4, num_groups=2) == (1, 3, 4, 6)
    assert lowest(torch.zeros(6), 4, num_groups=2) == (0, 1, 3, 4)


def test_lowest_equals_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 4, (12,), generator=generator).double()
        for groups, count in itertools.product((1, 2, 3, 4), (0, 12 // 4, 12)):
            if count % groups:
                continue
            slow = []
            for g in range(groups):
                members = range(g * 12 // groups, (g + 1) * 12 // groups)
                slow += sorted(members, key=lambda e: (float(scores[e]), e))[: count // groups]
            assert lowest(scores, count, groups) == tuple(sorted(slow))


def removed_share(scores_LE: list[torch.Tensor], shape: ModelShape, counts: tuple[int, ...]) -> float:
    """What the dropped experts held of their layers' scores."""
    total = 0.0
    for scores_E, layer, count in zip(scores_LE, shape.layers, counts, strict=True):
        total += float(scores_E[list(lowest(scores_E, count, layer.num_groups))].sum() / scores_E.sum())
    return total


@pytest.mark.parametrize("seed", range(5))
def test_global_counts_equal_brute_force(seed: int) -> None:
    """Among all counts with the same total, the ones that drop the least share of score."""
    shape = toy_shape(layers=3, experts=6, top_k=2)
    generator = torch.Generator().manual_seed(seed)
    scores_LE = [torch.rand(6, generator=generator, dtype=torch.float64) * 10 ** (i - 1) for i in range(3)]
    for total in range(13):
        counts = global_counts(scores_LE, shape, total / 12)
        every = [c for c in itertools.product(range(5), repeat=3) if sum(c) == total]
        best = min(every, key=lambda c: removed_share(scores_LE, shape, c))
        assert sum(counts) == total and tuple(counts) == best


@pytest.mark.parametrize("seed", range(5))
def test_global_counts_with_groups_equal_a_slow_loop(seed: int) -> None:
    """One expert of every group goes at a time; a round costs what its dearest expert is worth."""
    shape = toy_shape(layers=2, experts=8, top_k=2, num_groups=2, min_per_group=2)
    generator = torch.Generator().manual_seed(seed)
    scores_LE = [torch.rand(8, generator=generator, dtype=torch.float64) + (torch.arange(8) >= 4) for _ in range(2)]
    rounds = []
    for index, scores_E in enumerate(scores_LE):
        left, right = (sorted((scores_E / scores_E.sum())[part].tolist()) for part in (slice(0, 4), slice(4, 8)))
        rounds += [(max(pair), index) for pair in zip(left[:2], right[:2], strict=True)]
    rounds.sort()
    for taken in range(5):
        expected = [2 * sum(index == i for _, index in rounds[:taken]) for i in range(2)]
        assert global_counts(scores_LE, shape, taken / 4) == expected
        dropping(shape, [0, 0])  # and the counts are ones that a plan may have:
        layers = []
        for scores_E, layer, count in zip(scores_LE, shape.layers, expected, strict=True):
            gone = lowest(scores_E, count, layer.num_groups)
            layers.append(LayerPlan(layer.name, tuple(DROPPED if e in gone else KEPT for e in range(8))))
        make_plan(shape, layers)


def test_a_costly_group_makes_its_layer_costly() -> None:
    """Both groups must give one up, so a layer with one cheap group is not cheap."""
    shape = toy_shape(layers=2, experts=8, top_k=2, num_groups=2, min_per_group=2)
    lopsided = torch.tensor([1.0, 1, 1, 1, 24, 24, 24, 24])
    even = torch.tensor([10.0, 10, 15, 15, 10, 10, 15, 15])
    assert global_counts([lopsided, even], shape, 0.5) == [0, 4]


def test_global_counts_edges() -> None:
    shape = toy_shape(layers=2, experts=6, top_k=2)
    zeros = [torch.zeros(6, dtype=torch.float64)] * 2
    assert global_counts(zeros, shape, 0.5) == [4, 0]  # ties: the earlier layer gives first
    assert global_counts(zeros, shape, 0) == [0, 0] and global_counts(zeros, shape, 1) == [4, 4]
    scores = [torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([100.0, 200, 300, 400, 500, 600])]
    assert global_counts(scores, shape, 0.5) == [2, 2]  # a layer with larger scores is not dearer for it
    for low, high in itertools.pairwise(global_counts(scores, shape, a / 20) for a in range(21)):
        assert all(a <= b for a, b in zip(low, high, strict=True))
