"""MoE-I2 and low-rank decomposition: what explore asks of a model and finds, and what plans make of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from locum.budgets.ranks import rank_bounds, rank_shares
from locum.budgets.target import Target
from locum.criteria.criterion import CRITERIA
from locum.errors import PlanError, StatisticsError
from locum.methods import METHODS
from locum.methods.decompose import Decompose
from locum.methods.moe_i2 import MoEI2
from locum.plans.plan import DROPPED, KEPT, Plan
from locum.shapes import ModelShape
from locum.stages.planning import decide
from locum.stats.sums import Statistics
from making.handmade import layers_of, make_statistics, toy_shape, with_sums
from making.slots import rank_of, start_of

SHAPE = toy_shape(layers=4, experts=8)
QUICK = {"population": 20, "generations": 5}


class Explorer:
    """A model whose errors are known functions of what is removed, and which remembers what it was asked.

    The error of a layer is the sum of its experts' worths, plus what removing two of a pair together costs extra. A
    block's error is that of its layers, unless everything that `planted` names goes: then it is 0.
    """

    def __init__(self, shape: ModelShape, seed: int = 0, planted: Mapping[str, tuple[int, ...]] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.planted, self.pruned = shape, planted or {}, None
        self.worth = {
            layer.name: (0.1 + torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)) * 4**index
            for index, layer in enumerate(shape.layers)
        }
        self.extra = {layer.name: {(0, 1): 5.0 * 4**index} for index, layer in enumerate(shape.layers)}
        self.asked: list[tuple[str, str, int]] = []
        self.blocks: list[list[str]] = []

    def _error(self, layer: str, removed_E: Tensor) -> float:
        gone = set(removed_E.nonzero().flatten().tolist())
        return float(self.worth[layer][removed_E].sum()) + sum(
            cost for pair, cost in self.extra[layer].items() if gone.issuperset(pair)
        )

    def _against_pruned(self, layer: str, removed_CE: Tensor) -> Tensor:
        gone_E = torch.zeros_like(removed_CE[0]) if self.pruned is None else self.pruned[layer]
        before = self._error(layer, gone_E)
        return torch.tensor([self._error(layer, row_E | gone_E) - before for row_E in removed_CE]).double()

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        self.asked.append(("output", layer, len(removed_CE)))
        return self._against_pruned(layer, removed_CE)

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        self.asked.append(("loss", layer, len(removed_CE)))
        return self._against_pruned(layer, removed_CE) - 0.5

    def block_error(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        self.blocks.append(list(candidates[0]))
        errors = []
        for masks in candidates:
            sets = {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()}
            perfect = all(self.planted.get(name) == members for name, members in sets.items())
            errors.append(0.0 if perfect else sum(self._error(name, mask) for name, mask in masks.items()))
        return torch.tensor(errors, dtype=torch.float64)

    def prune(self, removed: Mapping[str, Tensor]) -> None:
        assert self.pruned is None
        self.pruned = dict(removed)


def explored(explorer: Explorer, **options: object) -> dict[str, dict[str, Tensor]]:
    return MoEI2(**{**QUICK, **options}).explore(explorer, lambda stage, done, total: None)


def found_sets(found: dict[str, dict[str, Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(named["dropped"].nonzero().flatten().tolist()) for named in found.values()]


def best_sets(explorer: Explorer, name: str, count: int) -> list[tuple[int, ...]]:
    """All sets of a layer, those with the lowest error first."""
    sets = list(itertools.combinations(range(8), count))

    def error(members: tuple[int, ...]) -> float:
        return explorer._error(name, torch.tensor([e in members for e in range(8)]))

    return sorted(sets, key=error)


# --- explore ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_one_candidate_gives_the_best_set_of_every_layer(seed: int) -> None:
    explorer = Explorer(SHAPE, seed)
    found = explored(explorer, candidates=1, counts="uniform")
    assert found_sets(found) == [best_sets(explorer, layer.name, 2)[0] for layer in SHAPE.layers]
    assert explorer.blocks == []  # nothing to choose from


def test_blocks_choose_the_planted_combination_and_the_last_one_is_shorter() -> None:
    """The third and second best sets of the first three layers are perfect together; the last layer is a block alone."""
    names = [layer.name for layer in SHAPE.layers]
    plain = Explorer(SHAPE)
    planted = {name: best_sets(plain, name, 2)[2 - index % 2] for index, name in enumerate(names[:3])}
    explorer = Explorer(SHAPE, planted=planted)
    found = explored(explorer, counts="uniform")
    assert found_sets(found) == [*planted.values(), best_sets(plain, names[3], 2)[0]]
    assert explorer.blocks == [names[:3], names[3:]]
    assert found_sets(explored(Explorer(SHAPE, planted=planted), counts="uniform", candidates=2)) != found_sets(found)


def test_importance_is_taken_anew_on_the_pruned_model() -> None:
    explorer = Explorer(SHAPE)
    found = explored(explorer, counts="uniform")
    assert explorer.pruned is not None
    for layer in SHAPE.layers:
        gone_E, value_E = found[layer.name]["dropped"] > 0, found[layer.name]["pruned_importance"]
        assert torch.equal(explorer.pruned[layer.name], gone_E) and value_E.dtype == torch.float64
        for e in range(8):
            alone = torch.tensor([i == e for i in range(8)])
            cost = explorer._error(layer.name, alone | gone_E) - explorer._error(layer.name, gone_E)
            assert float(value_E[e]) == pytest.approx(0 if gone_E[e] else cost)
    first, anew = explorer.asked[0], explorer.asked[-1]
    assert first == ("output", SHAPE.layers[0].name, 8)
    assert anew[2] == 8 - int(found[SHAPE.layers[-1].name]["dropped"].sum())


def test_layers_that_matter_less_lose_more() -> None:
    """Worths grow fourfold from layer to layer."""
    counts = {
        policy: [len(s) for s in found_sets(explored(Explorer(SHAPE), counts=policy))] for policy in ("inverse", "gap")
    }
    assert counts["inverse"][0] == 6 and sum(counts["inverse"]) == 8
    assert counts["inverse"] == sorted(counts["inverse"], reverse=True)
    assert sum(counts["gap"]) == 8 and counts["gap"][-1] == 0


def test_loss_can_be_the_importance_and_is_not_below_nothing() -> None:
    explorer = Explorer(SHAPE)
    found = explored(explorer, importance="loss", counts="uniform")
    assert [kind for kind, _, size in explorer.asked if size == 8][:4] == ["loss"] * 4
    assert all(float(named["pruned_importance"].min()) >= 0 for named in found.values())
    assert {name for kind, name, _ in explorer.asked if kind == "output"} == set(found)  # the search stays with outputs


def test_groups_floors_and_refusals_hold() -> None:
    shape = toy_shape(layers=2, experts=8, num_groups=2, min_per_group=2)
    for members in found_sets(explored(Explorer(shape), pruned=0.9)):
        assert [sum(e // 4 == g for e in members) for g in range(2)] == [2, 2]
    full = toy_shape(layers=2, experts=8, top_k=8)  # nothing to spare, so nothing is asked
    explorer = Explorer(full)
    found = explored(explorer)
    assert found_sets(found) == [(), ()] and explorer.asked == []
    assert layers_of(MoEI2(), statistics_of(full, found), full, 0.5)[0].replaced == tuple(range(8))
    layers = tuple(dataclasses.replace(layer, refuse_dropping="it says so") for layer in SHAPE.layers)
    refusing = dataclasses.replace(SHAPE, layers=layers)
    assert found_sets(explored(Explorer(refusing))) == [()] * 4


def test_the_same_seed_finds_the_same_and_progress_reaches_the_end() -> None:
    shape = toy_shape(layers=2, experts=24)
    steps: list[tuple[str, int, int]] = []
    one, two = Explorer(shape), Explorer(shape)
    method = MoEI2(**QUICK)
    first = method.explore(one, lambda *step: steps.append(step))
    assert found_sets(first) == found_sets(explored(two)) and one.asked == two.asked
    assert {stage: max(done for s, done, _ in steps if s == stage) for stage, _, _ in steps} == dict.fromkeys(
        ("importance", "search", "blocks", "importance anew"), 2
    )


def test_errors_that_are_not_finite_are_refused() -> None:
    explorer = Explorer(SHAPE)
    explorer.worth[SHAPE.layers[1].name][3] = torch.nan
    with pytest.raises(StatisticsError, match="not finite"):
        explored(explorer)


# --- plans --------------------------------------------------------------------------------------------------------


def statistics_of(shape: ModelShape, found: dict[str, dict[str, Tensor]]) -> Statistics:
    names = ("dropped", "pruned_importance")
    return with_sums(shape, **{name: [found[layer.name][name] for layer in shape.layers] for name in names})


def plans(method: object, statistics: Statistics, shape: ModelShape, **target: float) -> Plan:
    return decide(method, statistics, shape, Target(**target))


@pytest.fixture(scope="module")
def searched() -> Statistics:
    return statistics_of(SHAPE, explored(Explorer(SHAPE), counts="gap"))


def test_a_plan_drops_what_the_search_found_and_ranks_the_rest(searched: Statistics) -> None:
    plan = plans(MoEI2(), searched, SHAPE, remove=0.6)
    assert plan.removed(SHAPE) == pytest.approx(0.6, abs=0.02)
    for layer in plan.layers:
        named = searched.layer(layer.layer)
        assert [slot == DROPPED for slot in layer.slots] == (named["dropped"] > 0).tolist()
        least, dense, step = rank_bounds(SHAPE.layers[0], 1, 16)
        ranks = {e: rank_of(layer.slots[e]) or dense for e in layer.survivors}
        assert all(rank % step == 0 and least <= rank <= dense for rank in ranks.values())
        worth = named["pruned_importance"].tolist()
        order = sorted(ranks, key=lambda e: worth[e])
        assert all(ranks[a] <= ranks[b] + step for a, b in itertools.pairwise(order))
        assert len(set(ranks.values())) > 1
        assert {start_of(s) for s in layer.slots if rank_of(s)} == {"whitened"}


@pytest.mark.parametrize("name", ["decompose", "moe-i2"])
def test_targets_are_met_closely(name: str) -> None:
    """Ranks change in steps of 16 of 85: a tenth of the 48 experts' smallest change in one layer."""
    shape = toy_shape()
    statistics = make_statistics(shape)
    one_step = 16 / 85.3 / 48
    for remove in (0.2, 0.25, 0.4, 0.5, 0.75):
        plan = plans(METHODS[name](), statistics, shape, remove=remove)
        assert abs(plan.removed(shape) - remove) <= 3 * one_step
    fits = plans(METHODS[name](), statistics, shape, fit=shape.bytes // 2)
    assert shape.bytes // 2 - 6 * one_step * shape.bytes <= fits.size(shape).bytes <= shape.bytes // 2


def test_the_search_alone_is_a_plan_too(searched: Statistics) -> None:
    method = MoEI2(decompose=False)
    assert method.needs() == ("dropped",)
    plan = plans(method, searched, SHAPE, remove=0.25)
    assert plan.removed(SHAPE) == 0.25 and {slot for layer in plan.layers for slot in layer.slots} == {KEPT, DROPPED}
    assert plans(MoEI2(), searched, SHAPE, remove=0.25).layers == plan.layers
    with pytest.raises(PlanError, match=r"--remove 0\.5 is out of reach: this method can remove 0.2500"):
        plans(method, searched, SHAPE, remove=0.5)
    with pytest.raises(PlanError, match=r"--fit .* is out of reach"):
        plans(method, searched, SHAPE, fit=SHAPE.bytes // 2)


@pytest.mark.parametrize("decompose", [True, False])
def test_less_than_the_search_dropped_is_refused(searched: Statistics, decompose: bool) -> None:
    with pytest.raises(PlanError, match=r"--remove 0.1 is too little .*the least it removes here is 0\.2500"):
        plans(MoEI2(decompose=decompose), searched, SHAPE, remove=0.1)
    assert plans(MoEI2(decompose=decompose), searched, SHAPE, remove=0.24).removed(SHAPE) == 0.25
    assert plans(MoEI2(decompose=decompose), searched, SHAPE, fit=SHAPE.bytes - 1).removed(SHAPE) == 0.25
    assert plans(MoEI2(decompose=decompose), searched, SHAPE, fit=SHAPE.bytes).removed(SHAPE) == 0


def test_needs_follow_the_options() -> None:
    assert MoEI2(start="svd").needs() == ("dropped", "pruned_importance")
    assert MoEI2().needs() == ("dropped", "pruned_importance", "input_gram", "hidden_gram")
    assert Decompose(start="svd").needs() == CRITERIA["reap"].needs
    assert Decompose().needs() == (*CRITERIA["reap"].needs, "input_gram", "hidden_gram")
    assert Decompose(score="none", start="svd").needs() == Decompose(exponent=0.0, start="svd").needs() == ()


@pytest.mark.parametrize("options", [{"score": "none"}, {"exponent": 0.0}])
def test_decomposing_without_statistics_gives_all_experts_one_rank(options: dict) -> None:
    layers = layers_of(Decompose(**options), None, SHAPE, 0.8)
    ranks = {rank_of(slot) for layer in layers for slot in layer.slots}
    assert max(ranks) - min(ranks) <= 16 and min(ranks) >= 16


def test_decompose_follows_its_criterion() -> None:
    shape = toy_shape()
    statistics = make_statistics(shape)
    for score in ("reap", "frequency"):
        for layer in layers_of(Decompose(score=score, multiple=1), statistics, shape, 0.5):
            score_E = CRITERIA[score](statistics.layer(layer.layer))
            _, dense, _ = rank_bounds(shape.layers[0], 1, 1)
            ranks = [rank_of(slot) or dense for slot in layer.slots]
            ideal = rank_shares(score_E) * sum(ranks)
            free = [e for e in range(16) if 1 < ranks[e] < dense]
            assert len(free) > 8
            ratio = [ranks[e] / float(ideal[e]) for e in free]
            assert max(ratio) / min(ratio) < 1.1
