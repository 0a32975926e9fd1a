"""Every registered method: one conformance suite for all, also for yours; then each method against slow loops."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

from locum.budgets.clusters import tree
from locum.containers.layout import active_parameters
from locum.criteria.criterion import CRITERIA
from locum.errors import PlanError, StatisticsError
from locum.experts.parts.left_factors import LeftFactors
from locum.experts.parts.part import Part
from locum.measure.calibration import calibrate
from locum.methods import METHODS
from locum.methods.d2_moe import D2MoE
from locum.methods.hc_smoe import HCSMoE
from locum.methods.lightmoe import LightMoE
from locum.methods.m_smoe import MSMoE
from locum.methods.mone import MoNE
from locum.methods.prune import Prune
from locum.methods.replace import Replace
from locum.methods.res_moe import ResMoE
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, Plan, make_plan, stand_in
from locum.shapes import ModelShape
from locum.stats.sums import STATISTICS, Statistics, mean_output
from making.groups import assert_weights, groups_of, joined
from making.handmade import layers_of, make_statistics, relabel, restrict, tokens_of, toy_shape, with_search, with_sums
from making.slots import base_of, rank_of, start_of
from making.tiny_models import tiny_ids, tiny_model

ALL = tuple(METHODS)
READING = tuple(name for name in ALL if METHODS[name]().needs())  # the others plan from a shape alone
STORED = tuple(
    name for name in ALL if METHODS[name].saves == "stored"
)  # the others remove nothing, whatever the amount
REFUSE_GROUPS = ("groups",)  # a router with groups of its own gets no others
AMOUNTS = (0.0, 0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
SHAPE = toy_shape()
PAPER = r"arXiv \d{4}\.\d{5} \([^()]+\)|OpenReview \w+ \([^()]+\)|no paper \([^()]+\)"


def plan_of(method: object, statistics: Statistics, shape: ModelShape, amount: float) -> Plan:
    return make_plan(shape, layers_of(method, statistics, shape, amount))


# --- conformance: default options of everything registered -------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_plans_are_valid_deterministic_and_leave_statistics_alone(name: str) -> None:
    statistics = make_statistics(SHAPE)
    before = copy.deepcopy(statistics.layers)
    for amount in AMOUNTS:
        one, two = (plan_of(METHODS[name](), statistics, SHAPE, amount) for _ in range(2))
        assert one == two and one.dumps() == two.dumps() and Plan.loads(one.dumps()) == one
        assert [layer.layer for layer in one.layers] == [layer.name for layer in SHAPE.layers]
    for layer, named in before.items():
        assert all(torch.equal(tensor, statistics.layers[layer][key]) for key, tensor in named.items())


@pytest.mark.parametrize("name", ALL)
def test_needs_are_known_and_enough(name: str) -> None:
    method, statistics = METHODS[name](), make_statistics(SHAPE)
    assert set(method.needs()) <= set(STATISTICS)
    only = restrict(statistics, method.needs())
    for amount in AMOUNTS:
        assert plan_of(method, only, SHAPE, amount) == plan_of(method, statistics, SHAPE, amount)


@pytest.mark.parametrize("name", READING)
def test_missing_statistics_are_named(name: str) -> None:
    method = METHODS[name]()
    with pytest.raises(StatisticsError, match="has no statistic"):
        layers_of(method, restrict(make_statistics(SHAPE), ("samples",)), SHAPE, 0.5)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("seed", [0, 1])
def test_amount_goes_from_nothing_to_most(name: str, seed: int) -> None:
    statistics = make_statistics(SHAPE, seed)
    plans = [plan_of(METHODS[name](), statistics, SHAPE, amount) for amount in AMOUNTS]
    removed = [plan.removed(SHAPE) for plan in plans]
    assert removed[0] == 0 and all(layer.is_identity for layer in plans[0].layers)
    assert removed[-1] > 0.4 and removed == sorted(removed)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].saves == "active"])
def test_a_method_that_saves_active_parameters_does(name: str) -> None:
    plan = plan_of(METHODS[name](), make_statistics(SHAPE), SHAPE, 1.0)
    assert active_parameters(SHAPE, plan) < active_parameters(SHAPE)
    assert all(plan_of(METHODS[name](), make_statistics(SHAPE), SHAPE, amount) == plan for amount in AMOUNTS)
    assert METHODS[name]().needs() or plan_of(METHODS[name](), None, SHAPE, 1.0) == plan


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].saves == "products"])
def test_a_method_that_saves_products_changes_every_expert_where_it_lies(name: str) -> None:
    statistics = make_statistics(SHAPE)
    plans = [plan_of(METHODS[name](), statistics, SHAPE, amount) for amount in AMOUNTS]
    assert all(plan == plans[0] for plan in plans) and plans[0].size(SHAPE).bytes == SHAPE.bytes
    assert all(layer.rewritten == tuple(range(16)) and layer.is_dense for layer in plans[0].layers)


@pytest.mark.parametrize("name", STORED)
def test_every_layer_is_smaller_or_whole(name: str) -> None:
    statistics = make_statistics(SHAPE)
    for amount in AMOUNTS:
        for layer, shape in zip(layers_of(METHODS[name](), statistics, SHAPE, amount), SHAPE.layers, strict=True):
            assert layer.is_identity or layer.parameters(shape) < shape.num_experts * shape.parameters()
            assert not (layer.is_identity and layer.bases)


def named(part: Part, label: list[int]) -> Part:
    """The same part, where it names experts under the labels given."""
    if not isinstance(part, LeftFactors):
        return part
    return dataclasses.replace(part, right=label[part.right], of=tuple(label[e] for e in part.of))


def meaning(plan: LayerPlan, label: list[int]) -> dict[int, object]:
    """What becomes of every expert, bases written out, under the labels given."""
    bases = [{label[e]: round(w, 9) for e, w in zip(b.experts, b.weights, strict=True)} for b in plan.bases]
    return {
        label[e]: (
            [named(part, label) for part in slot.parts if part.name != "shared_base"],
            None if base_of(slot) is None else bases[base_of(slot)],
        )
        for e, slot in enumerate(plan.slots)
    }


@pytest.mark.parametrize("name", ALL)
def test_numbering_of_experts_does_not_matter(name: str) -> None:
    statistics = make_statistics(SHAPE)
    assert all(bool((statistics.layer(layer.name)["count"] > 1).all()) for layer in SHAPE.layers)  # so nothing ties
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5)).tolist()
    for amount in AMOUNTS:
        plain = layers_of(METHODS[name](), statistics, SHAPE, amount)
        turned = layers_of(METHODS[name](), relabel(statistics, order), SHAPE, amount, order)
        for one, two in zip(plain, turned, strict=True):
            assert meaning(one, list(range(16))) == meaning(two, order)


@pytest.mark.parametrize("name", STORED)
def test_never_routed_experts_go_first_and_do_no_harm(name: str) -> None:
    never = (2, 9, 13)
    statistics = make_statistics(SHAPE, never=never)
    for amount in AMOUNTS:
        plan = plan_of(METHODS[name](), statistics, SHAPE, amount)
        for layer in plan.layers:
            if not layer.is_identity and sum(not slot.is_kept for slot in layer.slots) - len(layer.bases) >= 3:
                assert all(not layer.slots[e].is_kept for e in never)
    silent = make_statistics(SHAPE, never=tuple(range(2, 16)))  # all but the top-k
    assert plan_of(METHODS[name](), silent, SHAPE, 0.3).removed(SHAPE) > 0


@pytest.mark.parametrize("name", ALL)
def test_statistics_without_any_token_still_give_a_valid_plan(name: str) -> None:
    layers = {
        layer: {key: torch.zeros_like(tensor) for key, tensor in named.items()}
        for layer, named in make_statistics(SHAPE).layers.items()
    }
    empty = dataclasses.replace(make_statistics(SHAPE), layers=layers)
    for amount in AMOUNTS:
        plan_of(METHODS[name](), empty, SHAPE, amount)


@pytest.mark.parametrize("name", ALL)
def test_group_limited_routers_get_plans_they_can_use(name: str) -> None:
    shape = toy_shape(layers=2, num_groups=4, min_per_group=2)
    statistics = make_statistics(shape)
    if name in REFUSE_GROUPS:
        with pytest.raises(PlanError, match=r"own 4 groups of experts already"):
            plan_of(METHODS[name](), statistics, shape, 1.0)
        return
    for amount in AMOUNTS:
        plan_of(METHODS[name](), statistics, shape, amount)


@pytest.mark.parametrize("name", ALL)
def test_method_says_what_it_is(name: str) -> None:
    cls = METHODS[name]
    assert cls.name == name and re.fullmatch(PAPER, cls.paper)
    assert [heading for heading in ("Needs:", "Edges:", "Source:") if heading not in cls.__doc__] == []
    assert dataclasses.is_dataclass(cls) and all(item.metadata["help"] for item in dataclasses.fields(cls))


@pytest.mark.parametrize("name", STORED)
def test_on_the_statistics_of_a_real_model(name: str) -> None:
    model = tiny_model("olmoe", hidden_size=96, intermediate_size=64)
    method, shape = METHODS[name](), shape_of(model)
    summed = tuple(need for need in method.needs() if not STATISTICS[need].searched)
    statistics = calibrate(model, tokens_of(tiny_ids(4, 32)), needs=("gated_output_norm", *summed))
    statistics = with_search(statistics) if len(summed) < len(method.needs()) else statistics
    removed = [plan_of(method, statistics, shape, amount).removed(shape) for amount in AMOUNTS]
    assert removed[0] == 0 and removed[-1] == max(removed) > 0.1


# --- LightMoE ---------------------------------------------------------------------------------------------------


def slow_lightmoe(statistics: Statistics, name: str, candidates: list[int], num_bases: int) -> list[dict[int, float]]:
    """Groups as {expert: weight}, straight from section 3.2: plain lists, no tensors."""
    layer = statistics.layer(name)
    gates = layer["gate_sum"].tolist()
    similarity = [[value / float(layer["samples"]) for value in row] for row in layer["logit_cosine"].tolist()]
    by_mass = sorted(candidates, key=lambda e: gates[e], reverse=True)
    dominant = by_mass[:num_bases]
    members = {d: [d] for d in dominant}
    for e in by_mass[num_bases:]:
        best = dominant[0]
        for d in dominant:
            if similarity[e][d] > similarity[e][best]:
                best = d
        members[best].append(e)
    return [{e: gates[e] / sum(gates[i] for i in group) for e in group} for group in members.values()]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_bases", [1, 2, 3, 5])
def test_lightmoe_grouping_and_eq_4_equal_a_slow_loop(seed: int, num_bases: int) -> None:
    statistics = make_statistics(SHAPE, seed)
    method = LightMoE(bases=num_bases, rank=8)
    layers = layers_of(method, statistics, SHAPE, 0.4)
    assert any(not layer.is_identity for layer in layers)
    for layer in layers:
        if layer.is_identity:
            continue
        groups = slow_lightmoe(statistics, layer.layer, list(layer.replaced), num_bases)
        assert len(layer.bases) == len(groups) == min(num_bases, len(layer.replaced) - 1)
        for b, (base, group) in enumerate(zip(layer.bases, groups, strict=True)):
            assert list(base.experts) == sorted(group)
            assert base.weights == pytest.approx([group[e] for e in sorted(group)])
            assert all(layer.slots[e] == stand_in(base=b, rank=8, start="whitened") for e in group)
        assert all(layer.slots[e] == KEPT for e in range(16) if e not in layer.replaced)


def small(**values: list) -> Statistics:
    """One layer of six experts with gate mass 1..6 of 21 and logits of two kinds: 0, 2, 5 alike and 1, 3, 4 alike."""
    shape = toy_shape(layers=1, experts=6)
    kind = [0, 1, 0, 1, 1, 0]
    cosine = [[2.0 if kind[i] == kind[j] else -2.0 for j in range(6)] for i in range(6)]
    sums = {"gate_sum": [[1.0, 2, 3, 4, 5, 6]], "logit_norm": [8.0], "tokens": [4.0], "samples": [2.0]}
    return with_sums(shape, **sums, logit_cosine=[cosine], **values)


def test_lightmoe_by_hand() -> None:
    """Threshold 0.6 of the mass: 1+2+3+4 = 10/21 is below, 15/21 exceeds, so experts 0..4 go; dominant are 4 and 3."""
    shape = toy_shape(layers=1, experts=6)
    (layer,) = layers_of(LightMoE(bases=2), small(), shape, 0.6)
    assert layer.replaced == (0, 1, 2, 3, 4)
    assert [base.experts for base in layer.bases] == [(0, 1, 2, 4), (3,)]  # all others tie or prefer 4, the heavier
    (layer,) = layers_of(LightMoE(bases=3), small(), shape, 0.6)
    assert [base.experts for base in layer.bases] == [(1, 4), (3,), (0, 2)]
    assert layer.bases[0].weights == pytest.approx((2 / 7, 5 / 7))
    assert layer.bases[2].weights == pytest.approx((1 / 4, 3 / 4))


def test_lightmoe_layers_that_would_save_nothing_stay_whole() -> None:
    shape = toy_shape(layers=1, experts=6)
    for amount, replaced in ((0.01, 0), (0.1, 2), (0.2, 3)):
        (layer,) = layers_of(LightMoE(), small(), shape, amount)
        assert len(layer.replaced) == replaced and len(layer.bases) == max(replaced - 1, 0)
    (layer,) = layers_of(LightMoE(bases=5, rank=100), small(), shape, 0.5)  # rank 100 of 128: more than an expert
    assert layer == LayerPlan(shape.layers[0].name, (KEPT,) * 6)


def test_lightmoe_ranks_are_held_to_the_weights() -> None:
    shape = toy_shape(layers=1, experts=16, d=256, f=8)
    plan = plan_of(LightMoE(rank=16, bases=1), make_statistics(shape), shape, 0.5)
    assert plan.layers[0].is_identity  # rank 8 of 8 x 256 saves nothing
    assert max(rank_of(s) for s in plan_of(LightMoE(rank=4), make_statistics(shape), shape, 0.9).layers[0].slots) == 4


def test_kmeans_groups_by_mean_output() -> None:
    """Three clouds of mean outputs far apart are the three groups, whatever the routing says."""
    generator = torch.Generator().manual_seed(0)
    shape = toy_shape(layers=1, experts=12)
    cloud_E = torch.tensor([0, 1, 2] * 4)
    centre_KD = torch.randn(3, 256, generator=generator) * 10
    mean_ED = centre_KD[cloud_E] + torch.randn(12, 256, generator=generator)
    count_E = torch.arange(1, 13)
    statistics = with_sums(
        shape,
        gate_sum=[torch.arange(1, 13)],
        logit_norm=[1],
        tokens=[1],
        count=[count_E],
        output_sum=[mean_ED * count_E[:, None]],
    )
    (layer,) = layers_of(LightMoE(grouping="kmeans", selection="average"), statistics, shape, 1.0)
    groups = sorted(base.experts for base in layer.bases)
    assert groups == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    for base in layer.bases:
        assert base.weights == pytest.approx([(e + 1) / sum(i + 1 for i in base.experts) for e in base.experts])


@pytest.mark.parametrize("alive", [0, 1, 2, 5])
def test_kmeans_with_experts_that_were_never_routed(alive: int) -> None:
    """Their mean outputs are all zero: equal points are one point, and no warning or empty base comes of it."""
    shape = toy_shape(layers=1, experts=8)
    output_sum = torch.zeros(8, 256)
    output_sum[:alive] = torch.randn(alive, 256, generator=torch.Generator().manual_seed(0))
    ones_E = (torch.arange(8) < alive).double()
    statistics = with_sums(
        shape, gate_sum=[ones_E], logit_norm=[1], tokens=[1], count=[ones_E], output_sum=[output_sum]
    )
    plan = plan_of(LightMoE(grouping="kmeans", selection="average"), statistics, shape, 1.0)
    assert 1 <= len(plan.layers[0].bases) <= min(3, alive + 1) and len(plan.layers[0].replaced) == 8


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"selection": "uniform"}, "counts"),
        ({"selection": "average"}, "counts"),
        ({"clip": 0.0}, "counts"),
        ({"alpha": 0.0}, "counts"),
        ({"score": "reap"}, "experts"),
        ({"grouping": "kmeans"}, "bases"),
        ({"bases": 1}, "bases"),
        ({"rank": 4}, "rank"),
        ({"rank": 0}, "rank"),
        ({"start": "svd"}, "start"),
        ({"align": True}, "align"),
    ],
)
def test_every_switch_changes_what_it_should_and_nothing_else(change: dict, differs: str) -> None:
    statistics = make_statistics(SHAPE, 1)
    plain, other = (layers_of(m, statistics, SHAPE, 0.35) for m in (LightMoE(), LightMoE(**change)))
    assert [layer.is_identity for layer in plain + other] == [False] * 6

    def views(layers: list[LayerPlan]) -> dict[str, object]:
        return {
            "counts": [len(layer.replaced) for layer in layers],
            "experts": [layer.replaced for layer in layers],
            "bases": [sorted(base.experts for base in layer.bases) for layer in layers],
            "rank": [sorted({rank_of(slot) for slot in layer.slots}) for layer in layers],
            "start": [sorted({start_of(slot) for slot in layer.slots if rank_of(slot)}) for layer in layers],
            "align": [{base.align for base in layer.bases} for layer in layers],
        }

    one, two = views(plain), views(other)
    changed = {key for key in one if one[key] != two[key]}
    follows = {"counts": {"counts", "experts", "bases"}, "experts": {"counts", "experts", "bases"}}
    assert differs in changed
    assert changed - {"start" if change == {"rank": 0} else ""} <= follows.get(differs, {differs})


def test_rank_0_is_plain_merging() -> None:
    plan = plan_of(LightMoE(rank=0, start="svd"), make_statistics(SHAPE), SHAPE, 0.5)
    slots = [slot for layer in plan.layers for slot in layer.slots if not slot.is_kept]
    assert slots and all(slot == stand_in(base=base_of(slot)) for slot in slots)


# --- merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("amount", [0.1, 0.4, 0.8, 1.0])
def test_m_smoe_equals_a_slow_loop(seed: int, amount: float) -> None:
    """Dominant experts by usage over all layers, straight from section 3.1 and its code."""
    statistics = make_statistics(SHAPE, seed)
    usage = [statistics.layer(layer.name)["count"].tolist() for layer in SHAPE.layers]
    extra = [statistics.layer(layer.name)["softmax_sum"].tolist() for layer in SHAPE.layers]
    ranked = sorted(
        (
            (n / max(counts), p, i, e)
            for i, counts in enumerate(usage)
            for e, (n, p) in enumerate(zip(counts, extra[i], strict=True))
        ),
    )
    best = [max(range(16), key=lambda e: (usage[i][e], extra[i][e])) for i in range(len(usage))]
    losers = [(i, e) for _, _, i, e in ranked if e != best[i]][: int(amount * 15 * len(usage) + 1e-9)]
    for i, (layer, shape) in enumerate(zip(layers_of(MSMoE(), statistics, SHAPE, amount), SHAPE.layers, strict=True)):
        named = statistics.layer(shape.name)
        merged = [e for number, e in losers if number == i]
        groups = {d: [d] for d in range(16) if d not in merged}
        for e in merged:
            groups[max(groups, key=lambda d: float(named["logit_cosine"][e, d]))].append(e)
        assert groups_of(layer) == sorted(tuple(sorted(group)) for group in groups.values())
        assert_weights(layer, usage[i])
    (uniform, *_) = layers_of(MSMoE(budget="uniform"), statistics, SHAPE, amount)
    assert len(groups_of(uniform)) == 16 - int(amount * 15)


@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
@pytest.mark.parametrize("over", ["routed", "all"])
def test_hc_smoe_equals_a_slow_loop(linkage: str, over: str) -> None:
    """Mean outputs, over the tokens that an expert got or over all."""
    statistics, method = make_statistics(SHAPE, 3), HCSMoE(linkage=linkage, over=over)
    for amount in (0.1, 0.4, 0.8, 1.0):
        for layer, shape in zip(layers_of(method, statistics, SHAPE, amount), SHAPE.layers, strict=True):
            named = statistics.layer(shape.name)
            total, counts = ("output_sum", named["count"]) if over == "routed" else ("every_output_sum", [64 * 2] * 16)
            mean = [named[total][e] / counts[e] for e in range(16)]
            far = [[float((a - b).norm()) for b in mean] for a in mean]
            clusters = joined(far, linkage, 16 - int(amount * 15 + 1e-9))
            assert groups_of(layer) == sorted(tuple(sorted(cluster)) for cluster in clusters)
            assert_weights(layer, named["count"].tolist())


def test_experts_that_no_token_selected_join_first_the_nearest_of_the_others() -> None:
    far = torch.tensor([[0, 1, 9, 8, 5], [1, 0, 9, 8, 6], [9, 9, 0, 7, 2], [8, 8, 7, 0, 3], [5, 6, 2, 3, 0.0]])
    joins = tree(far, torch.tensor([3, 2, 0, 4, 0]))  # expert 2 is nearest to 3, and 4 to 3, the nearer pair
    assert joins.groups(5) == [[0], [1], [2], [3], [4]]
    assert joins.groups(4) == [[0], [1], [2], [3, 4]]
    assert joins.groups(3) == [[0], [1], [2, 3, 4]]
    assert joins.groups(2) == [[0, 1], [2, 3, 4]] and joins.groups(1) == [[0, 1, 2, 3, 4]]
    assert tree(far, torch.zeros(5)).groups(4) == [[0, 1], [2], [3], [4]]
    assert tree(far, torch.tensor([0, 0, 1, 0, 0])).groups(3) == [[0], [1], [2, 3, 4]]  # 4 and then 3 are nearest to 2


# --- all experts over one base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("cls", [D2MoE, ResMoE])
def test_all_experts_share_one_base_and_one_rank(cls: type, amount: float) -> None:
    statistics = make_statistics(SHAPE)
    for layer, shape in zip(layers_of(cls(multiple=1), statistics, SHAPE, amount), SHAPE.layers, strict=True):
        d, f = shape.hidden_size, shape.expert_width
        rank = int((1 - amount) * -(-d * f // (d + f)) + 1e-9)
        if 3 * d * f + 16 * 3 * rank * (d + f) >= 16 * 3 * d * f:
            assert layer.is_identity
            continue
        assert set(layer.slots) == {stand_in(base=0, rank=rank, start="whitened" if cls is D2MoE else "svd")}
        counts = statistics.layer(shape.name)["count"].tolist()
        weights = [n / sum(counts) for n in counts] if cls is D2MoE else [1 / 16] * 16
        (base,) = layer.bases
        assert base.experts == tuple(range(16)) and base.weights == pytest.approx(weights)
        assert base.align == (cls is ResMoE)


# --- Replace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "base", "start"),
    [
        ({}, 0, "whitened"),
        ({"shared": False}, None, "whitened"),
        ({"start": "paper"}, 0, "gaussian"),
        ({"shared": False, "start": "paper"}, None, "svd"),
        ({"start": "svd"}, 0, "svd"),
        ({"shared": False, "start": "gaussian"}, None, "gaussian"),
    ],
)
def test_replace(options: dict, base: int | None, start: str) -> None:
    statistics = make_statistics(SHAPE)
    layers = layers_of(Replace(**options), statistics, SHAPE, 0.4)
    selected = layers_of(LightMoE(), statistics, SHAPE, 0.4)
    for layer, like in zip(layers, selected, strict=True):
        assert layer.replaced == like.replaced and layer.replaced  # "the same adaptive selection"
        assert {layer.slots[e] for e in layer.replaced} == {stand_in(base=base, rank=16, start=start)}
        if base is None:
            assert layer.bases == ()
        else:
            gates = statistics.layer(layer.layer)["gate_sum"]
            (only,) = layer.bases
            assert only.experts == layer.replaced and not only.align
            total = float(gates[list(layer.replaced)].sum())
            assert only.weights == pytest.approx([float(gates[e]) / total for e in layer.replaced])


@pytest.mark.parametrize("amount", [0.25, 0.6])
def test_the_svd_of_the_weakest_experts_alone(amount: float) -> None:
    statistics = make_statistics(SHAPE)
    method = Replace(shared=False, score="reap", selection="average", rank=8)
    for layer, shape in zip(layers_of(method, statistics, SHAPE, amount), SHAPE.layers, strict=True):
        named = statistics.layer(shape.name)
        scores = [float(named["gated_output_norm"][e] / named["count"][e]) for e in range(16)]
        weakest = sorted(range(16), key=lambda e: scores[e])[: round(amount * 16)]
        assert layer.replaced == tuple(sorted(weakest)) and not layer.bases
        assert {layer.slots[e] for e in weakest} == {stand_in(rank=8, start="whitened")}


def test_replace_layers_that_would_save_nothing_stay_whole() -> None:
    shape = toy_shape(layers=1, experts=6)
    (layer,) = layers_of(Replace(), small(), shape, 0.01)  # one expert: base and adapter are more than it was
    assert layer.is_identity and layer.bases == ()
    (layer,) = layers_of(Replace(shared=False), small(), shape, 0.01)
    assert layer.replaced == (0,)
    (layer,) = layers_of(Replace(shared=False, rank=100), small(), shape, 0.9)
    assert layer.is_identity


# --- MoNE and pruning -------------------------------------------------------------------------------------------


def test_mone_constants_go_to_the_steadiest_experts() -> None:
    statistics = make_statistics(SHAPE, 2)
    for layer, shape in zip(layers_of(MoNE(), statistics, SHAPE, 0.5), SHAPE.layers, strict=True):
        named = statistics.layer(shape.name)
        scores = []
        for e in range(16):
            n = float(named["count"][e])
            variance = (named["output_square"][e] - n * mean_output(named)[e] ** 2).clamp(min=0) / max(n - 1, 1)
            scores.append(float(named["gate_sum"][e] / named["tokens"] * variance.sum().sqrt()) if n > 1 else 0.0)
        assert layer.replaced == tuple(sorted(sorted(range(16), key=lambda e: scores[e])[:7]))  # half of 16 - top-2
        assert {layer.slots[e] for e in layer.replaced} == {stand_in(constant=True)} and not layer.bases


@pytest.mark.parametrize("cls", [Prune, MoNE])
@pytest.mark.parametrize("score", ["frequency", "gate", "reap", "ean", "mone"])
def test_the_lowest_scores_go(cls: type, score: str) -> None:
    statistics = make_statistics(SHAPE)
    for layer, shape in zip(layers_of(cls(score=score), statistics, SHAPE, 0.5), SHAPE.layers, strict=True):
        scores = CRITERIA[score](statistics.layer(shape.name)).tolist()
        gone = [e for e, slot in enumerate(layer.slots) if not slot.is_kept]
        assert len(gone) == 7
        assert max(scores[e] for e in gone) <= min(scores[e] for e in range(16) if e not in gone)


@pytest.mark.parametrize("cls", [Prune, MoNE])
def test_global_budget_takes_from_where_it_costs_least(cls: type) -> None:
    shape = toy_shape(layers=2, experts=8)
    steep, flat = [1, 1, 1, 1, 1, 1, 500, 500], [10] * 8
    statistics = with_sums(
        shape,
        gate_sum=[steep, flat],
        count=[steep, flat],
        output_sum=[torch.zeros(8, 256)] * 2,
    )

    def counts(budget: str) -> list[int]:
        layers = layers_of(cls(score="gate", budget=budget, protect=False), statistics, shape, 0.5)
        return [sum(not slot.is_kept for slot in layer.slots) for layer in layers]

    assert counts("uniform") == [3, 3] and counts("global") == [6, 0]


def test_uniform_pruning_is_stock_and_global_is_not() -> None:
    statistics = make_statistics(SHAPE)
    assert plan_of(Prune(), statistics, SHAPE, 0.5).is_stock(SHAPE)
    assert not plan_of(Prune(budget="global"), statistics, SHAPE, 0.5).is_stock(SHAPE)
    assert not plan_of(MoNE(), statistics, SHAPE, 0.5).is_stock(SHAPE)


def test_pruning_never_goes_below_top_k() -> None:
    shape = toy_shape(layers=2, experts=8, top_k=6)
    for budget in ("uniform", "global"):
        plan = plan_of(Prune(budget=budget), make_statistics(shape), shape, 1.0)
        assert [len(layer.survivors) for layer in plan.layers] == [6, 6]
