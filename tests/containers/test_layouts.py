"""Layouts: what a plan becomes as stacked tensors, and that a tampered one is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from locum.containers.layout import Layout
from locum.errors import CheckpointError
from locum.experts.policies.main_with_vectors import VECTORS, MainWithVectors
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, stand_in
from locum.shapes import LayerShape
from making.oracles import random_layer_plan
from making.slots import base_of, rank_of, rows_of


def layer_shape(has_gate=True, has_bias=False):
    return LayerShape("experts", 8, 2, 12, 10, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)


PLAN = LayerPlan(
    "experts",
    (
        DROPPED,
        stand_in(base=1, rank=3),
        KEPT,
        NOTHING,
        stand_in(base=0, rank=2, constant=True),
        stand_in(rank=3, start="svd"),
        KEPT,
        stand_in(constant=True),
    ),
    (Base((4,), (1.0,)), Base((1, 2), (0.5, 0.5))),
)


def test_a_plan_by_hand():
    layout = Layout.of(PLAN, layer_shape(has_bias=True))
    assert layout.dense_of == (3, 0, -1, 2, -1, 1, -1)  # kept experts first, then the bases in order
    assert rows_of(layout).ranks == (2, 3)
    assert rows_of(layout).rank_of == (1, -1, -1, 0, 1, -1, -1)
    assert rows_of(layout).adapter_of == (0, -1, -1, 0, 1, -1, -1)
    assert rows_of(layout).constant_of == (-1, -1, -1, 0, -1, -1, 1)
    assert (layout.num_experts, layout.num_dense, max(rows_of(layout).constant_of)) == (7, 4, 1)
    assert layout.tensor_shapes() == {
        "dense.gate_up_NGD": (4, 20, 12),
        "dense.down_NDF": (4, 12, 10),
        "dense.gate_up_bias_NG": (4, 20),
        "dense.down_bias_ND": (4, 12),
        "adapters.0.gate_up_A": (1, 4, 12),
        "adapters.0.gate_B_FR": (1, 10, 2),
        "adapters.0.up_B_FR": (1, 10, 2),
        "adapters.0.down_A_RF": (1, 2, 10),
        "adapters.0.down_B_DR": (1, 12, 2),
        "adapters.1.gate_up_A": (2, 6, 12),
        "adapters.1.gate_B_FR": (2, 10, 3),
        "adapters.1.up_B_FR": (2, 10, 3),
        "adapters.1.down_A_RF": (2, 3, 10),
        "adapters.1.down_B_DR": (2, 12, 3),
        "biases.gate_up_bias_NG": (1, 20),
        "biases.down_bias_ND": (1, 12),
        "constant_ND": (2, 12),
    }


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_tensors_hold_exactly_what_the_plan_counts(has_gate, has_bias):
    shape = layer_shape(has_gate, has_bias)
    for seed in range(50):
        policy = MainWithVectors(1, VECTORS[seed % 4]) if seed % 2 else None
        plan = dataclasses.replace(random_layer_plan(shape, seed), routing=policy)
        shapes = Layout.of(plan, shape).tensor_shapes()
        assert sum(math.prod(s) for s in shapes.values()) == plan.parameters(shape)


def test_every_row_has_a_user_and_only_bases_are_shared():
    for seed in range(50):
        plan = random_layer_plan(layer_shape(), seed)
        layout = Layout.of(plan, layer_shape())
        slots = [plan.slots[e] for e in plan.survivors]
        num_kept = sum(s.is_kept for s in slots)
        assert set(layout.dense_of) - {-1} == set(range(layout.num_dense))
        for slot, row in zip(slots, layout.dense_of, strict=True):
            if slot.is_kept:
                assert row < num_kept and layout.dense_of.count(row) == 1
            else:
                assert row == (-1 if base_of(slot) is None else num_kept + base_of(slot))
        for index, rank in enumerate(rows_of(layout).ranks):
            rows = [a for r, a in zip(rows_of(layout).rank_of, rows_of(layout).adapter_of, strict=True) if r == index]
            assert rows == list(range(sum(rank_of(s) == rank for s in slots)))


def test_json_round_trip():
    for seed in range(20):
        policy = MainWithVectors(1, VECTORS[seed % 4], seed % 3 == 0) if seed % 2 else None
        plan = dataclasses.replace(random_layer_plan(layer_shape(), seed), routing=policy)
        layout = Layout.of(plan, layer_shape())
        assert ("policy" in layout.to_json()) == (policy is not None)
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_adapters_for_training_come_after_those_that_are_there():
    layout = Layout.of(PLAN, layer_shape())
    more = layout.with_adapters((0, 1), 3)
    assert rows_of(more).ranks == rows_of(layout).ranks
    assert rows_of(more).rank_of == (1, 1, -1, 0, 1, 1, -1)
    assert rows_of(more).adapter_of == (0, 2, -1, 0, 1, 3, -1)
    assert rows_of(layout.with_adapters((0,), 5)).ranks == (2, 3, 5)


VERSION_1 = {
    "hidden_size": 12,
    "expert_width": 10,
    "has_gate": True,
    "has_bias": True,
    "dense_of": [3, 0, -1, 2, -1, 1, -1],
    "rank_of": [1, -1, -1, 0, 1, -1, -1],
    "adapter_of": [0, -1, -1, 0, 1, -1, -1],
    "constant_of": [-1, -1, -1, 0, -1, -1, 1],
    "ranks": [2, 3],
}


def test_layouts_of_version_1_are_read():
    assert Layout.from_json(VERSION_1) == Layout.of(PLAN, layer_shape(has_bias=True))
    policy = {"main": 1, "vectors": "static", "renormalise": True}
    assert Layout.from_json(VERSION_1 | {"routing": policy}).routing == MainWithVectors(**policy)


def changed(**changes):
    """The changes that some entry of the first adapter's stack has."""

    def change(data):
        stacks = [dict(stack) for stack in data["stacks"]]
        found = next(stack for stack in stacks if stack["part"] == "low_rank")
        found.update(changes)
        return data | {"stacks": stacks}

    return change


TAMPERED = {
    "unknown entry": lambda data: data | {"speed": 1},
    "entry of another kind": lambda data: data | {"stacks": 5},
    "size that is no number": lambda data: data | {"hidden_size": "12"},
    "size of nothing": lambda data: data | {"expert_width": 0},
    "a part that nobody knows": changed(part="moon"),
    "fewer experts in one list": changed(rows=[0] * 6),
    "row that is no number": changed(rows=[-1, -1, -1, "0", -1, -1, -1]),
    "row below -1": changed(rows=[-1, -1, -1, 0, -1, -2, -1]),
    "row that nobody uses": changed(rows=[-1, -1, -1, 1, -1, -1, -1]),
    "no row at all": changed(rows=[-1] * 7),
    "rank of zero": changed(variant=[0]),
    "rank larger than the weights": changed(variant=[30]),
    "two ranks": changed(variant=[2, 3]),
    "two stacks that are alike": changed(variant=[3]),
    "policy of another kind": lambda data: data | {"policy": 2},
    "policy without a name": lambda data: data | {"policy": {"main": 1}},
    "policy that nobody knows": lambda data: data | {"policy": {"policy": "moon"}},
    "policy that lets none run": lambda data: data | {"policy": {"policy": "main_with_vectors", "main": 0}},
    "policy with vectors that are not there": lambda data: (
        data | {"policy": {"policy": "main_with_vectors", "main": 1, "vectors": "two"}}
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_layout_is_refused(what):
    data = TAMPERED[what](Layout.of(PLAN, layer_shape()).to_json())
    with pytest.raises(CheckpointError, match=r"layout in config\.json"):
        Layout.from_json(json.loads(json.dumps(data)))


TAMPERED_1 = {
    "unknown entry": {"speed": 1},
    "entry of another kind": {"dense_of": 5},
    "size that is no number": {"hidden_size": "12"},
    "size of nothing": {"expert_width": 0},
    "fewer experts in one list": {"rank_of": [-1] * 6},
    "row that is no number": {"constant_of": [-1, -1, -1, "0", -1, -1, 1]},
    "row below -1": {"constant_of": [-1, -1, -1, 0, -1, -2, 1]},
    "row that nobody uses": {"constant_of": [-1, -1, -1, 0, -1, -1, 2]},
    "rank that is not there": {"rank_of": [2, -1, -1, 0, 1, -1, -1]},
    "rank without an adapter": {"adapter_of": [0, -1, -1, 0, -1, -1, -1]},
    "adapter without a rank": {"adapter_of": [0, 0, -1, 0, 1, -1, -1]},
    "rank of zero": {"ranks": [0, 3]},
    "rank larger than the weights": {"ranks": [2, 30]},
    "rank listed but not used": {"ranks": [2, 3, 4]},
    "policy of another kind": {"routing": 2},
    "policy without its number": {"routing": {"vectors": "none"}},
    "policy that lets none run": {"routing": {"main": 0}},
    "policy with a number of another kind": {"routing": {"main": True}},
    "policy with vectors that are not there": {"routing": {"main": 1, "vectors": "two"}},
    "policy with an unknown entry": {"routing": {"main": 1, "aux": 1}},
}


@pytest.mark.parametrize("what", TAMPERED_1)
def test_a_tampered_layout_of_version_1_is_refused(what):
    data = VERSION_1 | TAMPERED_1[what]
    with pytest.raises(CheckpointError, match=r"layout in config\.json"):
        Layout.from_json(json.loads(json.dumps(data)))


@pytest.mark.parametrize("data", [None, [], "x", {}, {"hidden_size": 12}])
def test_something_else_is_refused(data):
    with pytest.raises(CheckpointError, match=r"layout in config\.json"):
        Layout.from_json(data)


def test_vectors_are_as_wide_as_what_they_modulate():
    """Width 12 x 10, seven survivors: gate and up read 12 each, down reads 10."""
    widths = {"projections": (7, 34), "hidden": (7, 12), "static": (1, 34), "none": None}
    for vectors, expected in widths.items():
        layout = Layout.of(dataclasses.replace(PLAN, routing=MainWithVectors(1, vectors)), layer_shape())
        assert layout.tensor_shapes().get("offsets_NV") == expected
    without_gate = Layout.of(dataclasses.replace(PLAN, routing=MainWithVectors(1)), layer_shape(has_gate=False))
    assert without_gate.tensor_shapes()["offsets_NV"] == (7, 22)
    assert layout.with_adapters((0,), 5).routing == layout.routing


def test_one_token_uses_the_largest_experts_at_most():
    """An expert has 360 parameters, a rank-3 adapter 198, a rank-2 one 132, a constant 12."""
    layout = Layout.of(PLAN, layer_shape())
    assert [layout.active_parameters(k) for k in (1, 2, 3, 9)] == [558, 1062, 1422, 558 + 504 + 720 + 198 + 12]
    policy = dataclasses.replace(layout, routing=MainWithVectors(1))
    assert [policy.active_parameters(k) for k in (1, 2, 3)] == [558, 558 + 34, 558 + 68]
    assert dataclasses.replace(layout, routing=MainWithVectors(1, "static")).active_parameters(3) == 558 + 34
    assert dataclasses.replace(layout, routing=MainWithVectors(2, "none")).active_parameters(3) == 1062
