"""Deciding in two steps: a method scores once, plans for any amount or for a target itself, and may read weights.

Two methods that are no part of Locum stand for what others add: one clusters weights, one fills a knapsack exactly. The
conformance suite runs over both.

Letters: E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

import locum
import test_methods as conformance
from locum.budgets.counts import spare
from locum.budgets.ranking import layer_scores
from locum.budgets.target import Target
from locum.criteria.criterion import CRITERIA, Criterion
from locum.errors import OptionError, PlanError, StatisticsError
from locum.methods import METHODS, TargetMethod, Weights, method
from locum.options import option
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, stand_in
from locum.shapes import ModelShape
from locum.stages.planning import decide
from locum.stats.sums import LayerStatistics, Statistics
from making.checkpoints import write_checkpoint, write_text
from making.handmade import make_statistics, toy_shape

SHAPE = toy_shape(layers=3, experts=8)
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 16}


@dataclass(frozen=True)
class Clusters:
    """Merge the least used experts of every layer into the means of clusters of their weights.

    Needs:    count.
    Edges:    a layer of which one expert would go stays whole.
    Source:   made up for this test.
    """

    bases: int = option(2, "shared bases per layer", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return ("count",)

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> list[tuple[list[int], np.ndarray]]:
        scored = []
        for layer in shape.layers:
            read = weights(layer.name)
            rows = np.stack([read(e).down_DF.float().mean(dim=1).numpy() for e in range(layer.num_experts)])
            order = statistics.layer(layer.name)["count"].sort(stable=True).indices.tolist()
            scored.append((order, rows))
        return scored

    def plan(self, scored: list[tuple[list[int], np.ndarray]], shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [self._layer(layer, *found, amount) for layer, found in zip(shape.layers, scored, strict=True)]

    def _layer(self, layer, order: list[int], rows: np.ndarray, amount: float) -> LayerPlan:
        members = sorted(order[: round(amount * layer.num_experts)])
        whole = LayerPlan(layer.name, (KEPT,) * layer.num_experts)
        if len(members) <= self.bases:
            return whole
        _, labels = kmeans2(rows[members], self.bases, minit="++", rng=0)
        groups = [[e for e, label in zip(members, labels, strict=True) if label == b] for b in range(self.bases)]
        groups = [group for group in groups if group]
        of = {e: b for b, group in enumerate(groups) for e in group}
        slots = tuple(stand_in(base=of[e]) if e in of else KEPT for e in range(layer.num_experts))
        return LayerPlan(layer.name, slots, tuple(Base(tuple(g), (1 / len(g),) * len(g)) for g in groups))


@dataclass(frozen=True)
class Knapsack:
    """Drop the experts with the least total score that make up the target, exactly, over all layers.

    Needs:    what the criterion needs.
    Edges:    never below top-k; equal numbers per group for group-limited routers.
    Source:   made up for this test.
    """

    score: str = option("frequency", "criterion by which experts are ranked")

    def needs(self) -> tuple[str, ...]:
        return CRITERIA[self.score].needs

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        return layer_scores(statistics, shape, self.score)

    def plan(self, scored: tuple[Tensor, ...], shape: ModelShape, amount: float) -> list[LayerPlan]:
        most = sum(spare(layer) // layer.num_groups for layer in shape.layers)
        return self._dropping(scored, shape, int(amount * most + 1e-9))

    def plan_for(self, scored: tuple[Tensor, ...], shape: ModelShape, target: Target) -> list[LayerPlan]:
        layer = shape.layers[0]  # this one is for layers that are alike
        price = layer.num_groups * (layer.parameters() * shape.expert_itemsize + layer.router_bytes)
        steps = target.saving(shape) / price
        return self._dropping(scored, shape, round(steps) if target.remove is not None else math.ceil(steps))

    def _dropping(self, scored: tuple[Tensor, ...], shape: ModelShape, steps: int) -> list[LayerPlan]:
        """best[n]: the least score for which n steps can go from the layers so far, and how many go from each."""
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for layer, score_E in zip(shape.layers, scored, strict=True):
            costs = [0.0, *lowest_first(layer, score_E).sum(dim=0).cumsum(0).tolist()]
            most = spare(layer) // layer.num_groups
            found: dict[int, tuple[float, list[int]]] = {}
            for (n, (cost, counts)), more in itertools.product(best.items(), range(most + 1)):
                total = (cost + costs[more], [*counts, more])
                found[n + more] = min(found.get(n + more, (math.inf, [])), total)
            best = found
        counts = best[min(steps, max(best))][1]
        plans = []
        for layer, score_E, count in zip(shape.layers, scored, counts, strict=True):
            order_GE = score_E.view(layer.num_groups, -1).argsort(dim=1, stable=True)[:, :count]
            size = layer.num_experts // layer.num_groups
            gone = {e + size * g for g, row in enumerate(order_GE.tolist()) for e in row}
            plans.append(LayerPlan(layer.name, tuple(DROPPED if e in gone else KEPT for e in range(layer.num_experts))))
        return plans


def lowest_first(layer, score_E: Tensor) -> Tensor:
    return score_E.view(layer.num_groups, -1).sort(dim=1).values


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    method("clusters", paper="no paper (for a test)", reads_weights=True)(Clusters)
    method("knapsack", paper="no paper (for a test)")(Knapsack)
    yield


SUITE = [
    "test_plans_are_valid_deterministic_and_leave_statistics_alone",
    "test_needs_are_known_and_enough",
    "test_missing_statistics_are_named",
    "test_every_layer_is_smaller_or_whole",
    "test_statistics_without_any_token_still_give_a_valid_plan",
    "test_group_limited_routers_get_plans_they_can_use",
    "test_method_says_what_it_is",
]


@pytest.mark.parametrize("test", SUITE)
@pytest.mark.parametrize("name", ["clusters", "knapsack"])
def test_the_conformance_suite_runs_over_methods_of_others(name: str, test: str) -> None:
    getattr(conformance, test)(name)


# --- once ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A criterion "counted", equal to frequency, and the layers that it was asked for."""
    asked: list[str] = []

    def score(layer: LayerStatistics) -> Tensor:
        asked.append(layer.shape.name)
        return layer["count"].clone()

    monkeypatch.setattr(CRITERIA, "_items", dict(CRITERIA._items))
    CRITERIA.add("counted", Criterion("counted", "no paper (for a test)", ("count",), score))
    return asked


SCORING = [name for name in METHODS if "score" in METHODS[name].__dataclass_fields__]


@pytest.mark.parametrize("name", [*SCORING, "knapsack"])
def test_scores_are_made_once_for_a_whole_search(name: str, counted: list[str]) -> None:
    statistics = make_statistics(SHAPE)
    for asked in ({"remove": 0.4}, {"fit": str(int(0.8 * SHAPE.bytes))}):
        counted.clear()
        plan = locum.plan([statistics], method=name, score="counted", **asked)
        assert sorted(counted) == sorted(layer.name for layer in SHAPE.layers)
        assert plan.layers == locum.plan([statistics], method=name, score="frequency", **asked).layers


# --- a target at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plan_for_a_target_is_the_best_of_all(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every way to take 7 experts from three layers; the bisection is not called."""
    monkeypatch.setattr("locum.stages.planning.meet_target", None)
    statistics = make_statistics(SHAPE, seed)
    plan = decide(Knapsack(), statistics, SHAPE, Target(7 / 24))
    scores = [sorted(statistics.layer(layer.name)["count"].tolist()) for layer in SHAPE.layers]
    ways = [counts for counts in itertools.product(range(7), repeat=3) if sum(counts) == 7]
    least = min(sum(sum(scores[i][:n]) for i, n in enumerate(counts)) for counts in ways)
    dropped = [
        float(statistics.layer(layer.layer)["count"][e])
        for layer in plan.layers
        for e, slot in enumerate(layer.slots)
        if slot == DROPPED
    ]
    assert len(dropped) == 7 and sum(dropped) == pytest.approx(least)
    assert isinstance(Knapsack(), TargetMethod) and not isinstance(METHODS["prune"](), TargetMethod)


def test_a_plan_for_a_size_fits_and_no_expert_less_would() -> None:
    statistics, limit = make_statistics(SHAPE), int(0.7 * SHAPE.bytes)
    plan = locum.plan([statistics], method="knapsack", fit=str(limit))
    assert limit - SHAPE.layers[0].parameters() * SHAPE.expert_itemsize < plan.size(SHAPE).bytes <= limit


def test_a_target_that_was_not_met_is_refused_in_the_words_of_the_search() -> None:
    statistics = make_statistics(SHAPE)
    with pytest.raises(PlanError, match=r"--remove 0\.9 is out of reach: this method can remove 0\.7500"):
        locum.plan([statistics], method="knapsack", remove=0.9)
    with pytest.raises(PlanError, match=r"--fit 20,000 bytes is out of reach"):
        locum.plan([statistics], method="knapsack", fit="20000")


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint, text, and statistics of it."""
    folder = tmp_path_factory.mktemp("weights")
    write_checkpoint(folder / "model", **WIDE)
    write_text(folder / "a.txt")
    locum.calibrate(folder / "model", data=str(folder / "a.txt"), out=folder / "stats", tokens=2048, length=64)
    return folder


def test_a_method_reads_the_weights_of_the_checkpoint(place) -> None:
    plan = locum.plan(place / "stats", method="clusters", remove=0.4, model=place / "model")
    live, statistics = locum.load_model(place / "model"), locum.load_statistics(place / "stats")
    layer, shape = next(layer for layer in plan.layers if layer.bases), statistics.shape
    members = sorted(e for base in layer.bases for e in base.experts)
    down_EDF = live.get_submodule(layer.layer).down_proj.detach().float()
    _, labels = kmeans2(down_EDF.mean(dim=2)[members].numpy(), 2, minit="++", rng=0)
    expected = [tuple(e for e, label in zip(members, labels, strict=True) if label == b) for b in range(2)]
    assert [base.experts for base in layer.bases] == [group for group in expected if group]
    assert abs(plan.removed(shape) - 0.4) < 0.2 and not torch.equal(down_EDF[0], down_EDF[1])


def test_compress_gives_a_method_the_weights(place, tmp_path) -> None:
    asked = {"statistics": place / "stats", "data": str(place / "a.txt"), "method": "clusters", "remove": 0.4}
    out = locum.compress(place / "model", out=tmp_path / "out", **asked)
    plan = locum.plan(place / "stats", method="clusters", remove=0.4, model=place / "model")
    assert locum.load_plan(out / "plan.json").id == plan.id


def test_weights_that_are_missing_needless_or_of_another_model_are_refused(place, tmp_path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "other", **WIDE, seed=1)
    monkeypatch.setattr("locum.stages.planning.expert_readers", None)  # before weights are read
    with pytest.raises(
        StatisticsError, match=r"belong to another model \(fingerprint .*name the checkpoint that was cal"
    ):
        locum.plan(place / "stats", method="clusters", remove=0.4, model=tmp_path / "other")
    monkeypatch.setattr("locum.stages.planning.load_statistics", None)  # before statistics are
    with pytest.raises(OptionError, match=r"method clusters reads the experts' weights; name .* with --model"):
        locum.plan(place / "stats", method="clusters", remove=0.4)
    with pytest.raises(OptionError, match="method prune reads no weights; leave --model out"):
        locum.plan(place / "stats", method="prune", remove=0.4, model=place / "model")
    with pytest.raises(OptionError, match="model is a folder; give the checkpoint once"):
        locum.plan(place / "model", method="clusters", remove=0.4, model=place / "model")
