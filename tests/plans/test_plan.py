"""The plan: JSON both ways, what nonsense is refused with which words, differences, and sizes against counted tensors."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from locum.checkpoints.application import apply_plan
from locum.errors import PlanError
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_weights import OwnWeights
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans import version_1
from locum.plans.plan import (
    DROPPED,
    KEPT,
    NOTHING,
    Base,
    LayerPlan,
    Plan,
    Slot,
    diff,
    make_plan,
    stand_in,
    with_provenance,
    with_routing,
)
from locum.shapes import LayerShape, ModelShape
from making.handmade import toy_shape, with_sums
from making.tiny_models import CONFIGS, tiny_model

SHAPE = toy_shape(layers=2, experts=8, d=32, f=16)
ONE, TWO = (layer.name for layer in SHAPE.layers)


def everything() -> Plan:
    """A plan that has every part a plan can have."""
    slots = (
        KEPT,
        stand_in(base=0, rank=4),
        stand_in(base=0, rank=2, start="svd", constant=True),
        stand_in(base=1),
        stand_in(constant=True),
        NOTHING,
        DROPPED,
        stand_in(rank=3, start="svd"),
    )
    bases = (Base((1, 2), (0.25, 0.75), align=True), Base((3, 6), (1 / 3, 2 / 3)))
    layers = (LayerPlan(ONE, slots, bases), LayerPlan(TWO, (DROPPED, *(KEPT,) * 7)))
    return make_plan(SHAPE, layers, method="lightmoe", options={"rank": 4}, provenance={"seed": 0, "é": [1, None]})


def test_json_round_trip_is_byte_stable() -> None:
    plan = everything()
    text = plan.dumps()
    read = Plan.loads(text)
    assert read == plan and read.dumps() == text and read.id == plan.id


@pytest.mark.parametrize("layers", [(), (LayerPlan(ONE, (KEPT,) * 8),)])
def test_small_plans_round_trip(layers: tuple[LayerPlan, ...]) -> None:
    plan = make_plan(SHAPE, layers)
    assert Plan.loads(plan.dumps()) == plan


def test_one_line_for_every_expert_and_base() -> None:
    lines = everything().dumps().splitlines()
    assert sum(line.strip().startswith('{"expert": ') for line in lines) == 16
    assert sum(line.strip().startswith('{"experts": ') for line in lines) == 2
    base, adapter = '{"part": "shared_base", "base": 0}', '{"part": "low_rank", "rank": 4, "start": "gaussian"}'
    assert f'   {{"expert": 1, "parts": [{base}, {adapter}]}},' in lines
    assert '   {"expert": 0, "parts": [{"part": "own_weights"}]},' in lines
    assert '   {"expert": 5, "parts": []},' in lines and '   {"expert": 6, "dropped": true},' in lines


VERSION_1 = """{"kind": "locum-plan", "format_version": 1, "model_type": "toy", "shape_fingerprint": "FINGERPRINT",
"method": "lightmoe", "options": {"rank": 4}, "provenance": {}, "layers": [{"layer": "LAYER",
"routing": {"main": 1, "vectors": "hidden", "renormalise": true},
"bases": [{"experts": [1, 2], "weights": [0.25, 0.75], "align": true}], "experts": [
{"expert": 0, "becomes": "kept"},
{"expert": 1, "becomes": "stand_in", "base": 0, "rank": 4, "start": "svd"},
{"expert": 2, "becomes": "stand_in", "base": 0, "rank": 2, "start": "gaussian", "constant": true},
{"expert": 3, "becomes": "stand_in", "constant": true},
{"expert": 4, "becomes": "nothing"},
{"expert": 5, "becomes": "dropped"},
{"expert": 6, "becomes": "stand_in", "rank": 3, "start": "svd"},
{"expert": 7, "becomes": "kept"}]}]}"""


def test_files_of_version_1_are_read_and_keep_their_id() -> None:
    old = Plan.loads(VERSION_1.replace("FINGERPRINT", SHAPE.fingerprint).replace("LAYER", ONE)).validate(SHAPE)
    slots = (
        KEPT,
        stand_in(base=0, rank=4, start="svd"),
        stand_in(base=0, rank=2, constant=True),
        stand_in(constant=True),
        NOTHING,
        DROPPED,
        stand_in(rank=3, start="svd"),
        KEPT,
    )
    base = Base((1, 2), (0.25, 0.75), align=True)
    assert old.layers == (LayerPlan(ONE, slots, (base,), MainWithVectors(1, "hidden", True)),)
    assert old.id == "f862788833a3"  # what the version of Locum that wrote such files called it
    assert Plan.loads(old.dumps()) == old and Plan.loads(old.dumps()).id == old.id


def test_id_is_of_what_the_plan_does() -> None:
    plan = everything()
    assert with_provenance(plan, seed=1).id == plan.id and with_provenance(plan, seed=1).provenance["é"] == [1, None]
    assert dataclasses.replace(plan, layers=plan.layers[:1]).id != plan.id
    assert plan.needs and not make_plan(SHAPE, plan.layers[1:]).needs
    assert plan.layer(TWO) is plan.layers[1] and plan.layer("x") is None


def test_what_a_layer_plan_says_of_itself() -> None:
    one, two = everything().layers
    assert one.survivors == (0, 1, 2, 3, 4, 5, 7) and one.replaced == (1, 2, 3, 4, 5, 7)
    assert not one.is_dense and two.is_dense and not two.is_identity and LayerPlan(ONE, (KEPT,)).is_identity
    assert [str(slot) for slot in one.slots] == [
        "kept",
        "stand_in: base 0 + rank 4 (gaussian)",
        "stand_in: base 0 + rank 2 (svd) + constant",
        "stand_in: base 1",
        "stand_in: constant",
        "nothing",
        "dropped",
        "stand_in: rank 3 (svd)",
    ]


# --- hand-edited nonsense ---------------------------------------------------------------------------------------


def data() -> dict[str, Any]:
    return json.loads(everything().dumps())


def data_1() -> dict[str, Any]:
    """The same plan as version 1 wrote it."""
    return data() | {"format_version": 1, "layers": [version_1.layer_to_json(plan) for plan in everything().layers]}


def read(edited: dict[str, Any] | str) -> Plan:
    text = edited if isinstance(edited, str) else json.dumps(edited)
    return Plan.loads(text, "plan x.json").validate(SHAPE)


def layer(edited: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return edited["layers"][index]


def refused(edited: dict[str, Any] | str, *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(edited)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 600


EXPERT_EDITS_1 = [
    (0, {"becomes": "keep"}, ("expert 0", "unknown fate 'keep'", "did you mean 'kept'", "dropped")),
    (1, {"expert": 8}, (ONE, "expert 1 is missing", "every expert needs a line")),
    (1, {"expert": 2}, (ONE, "expert 2 is listed twice")),
    (1, {"expert": -1}, (ONE, "expert -1", "numbered from 0")),
    (1, {"expert": True}, (ONE, "'expert' is True", "a whole number")),
    (1, {"expert": "1"}, ("'expert' is '1'", "a whole number")),
    (1, {"rank": 17}, (ONE, "expert 1", "rank 17", "1 to 16", "32 x 16")),
    (1, {"rank": -1}, ("expert 1", "rank -1", "1 to 16")),
    (1, {"rank": True}, ("'rank' is True", "a whole number")),
    (1, {"rank": "4"}, ("'rank' is '4'", "a whole number")),
    (1, {"rank": 4.0}, ("'rank' is 4.0", "a whole number")),
    (1, {"rank": None}, ("'rank' is None",)),
    (1, {"ranks": 4}, ("unknown entry 'ranks'", "did you mean 'rank'", "allowed: base, becomes")),
    (1, {"start": "svg"}, ("expert 1", "unknown start 'svg'", "did you mean 'svd'")),
    (1, {"base": 2}, ("expert 1", "base 2", "the layer has 2 bases, numbered from 0")),
    (1, {"base": -1}, ("expert 1", "base -1")),
    (1, {"base": True}, ("'base' is True",)),
    (1, {"base": None}, ("'base' is None",)),
    (4, {"constant": False}, ("expert 4", "is a stand_in of nothing", "give it a base, a rank or a constant")),
    (4, {"constant": "yes"}, ("'constant' is 'yes'", "true or false")),
    (4, {"start": "svd"}, ("expert 4", "start 'svd' but no rank")),
    (0, {"rank": 2}, ("expert 0", "is 'kept' but has rank 2 (gaussian)", "only a stand_in")),
    (5, {"constant": True}, ("expert 5", "is 'nothing' but has constant")),
    (6, {"base": 0}, ("expert 6", "is 'dropped' but has base 0")),
    (3, {"base": 0}, ("base 1 is used by no expert", "remove it")),
]


@pytest.mark.parametrize(("expert", "change", "words"), EXPERT_EDITS_1)
def test_bad_expert_lines_of_version_1(expert: int, change: dict, words: tuple[str, ...]) -> None:
    edited = data_1()
    layer(edited)["experts"][expert] |= change
    refused(edited, *words)


OWN, BASE, ADAPTER = {"part": "own_weights"}, {"part": "shared_base", "base": 0}, {"part": "low_rank", "rank": 4}
EXPERT_EDITS = [
    (1, {"expert": 8}, (ONE, "expert 1 is missing", "every expert needs a line")),
    (1, {"expert": 2}, (ONE, "expert 2 is listed twice")),
    (1, {"expert": -1}, (ONE, "expert -1", "numbered from 0")),
    (1, {"expert": True}, (ONE, "'expert' is True", "a whole number")),
    (1, {"part": []}, ("unknown entry 'part'", "did you mean 'parts'")),
    (1, {"parts": {}}, ("'parts' is {}", "a list")),
    (1, {"dropped": True}, ('either "parts", a list, or "dropped": true',)),
    (6, {"dropped": False}, ('either "parts", a list, or "dropped": true',)),
    (6, {"parts": [OWN]}, ('either "parts", a list, or "dropped": true',)),
    (1, {"parts": [3]}, ("a part is 3", '"part": "NAME"')),
    (1, {"parts": [{"rank": 3}]}, ("a part is {'rank': 3}", '"part": "NAME"')),
    (1, {"parts": [{"part": "low_rnk"}]}, ("unknown part 'low_rnk'", "did you mean 'low_rank'", "install the package")),
    (1, {"parts": [{"part": "low_rank"}]}, ("low_rank", "lacks the entry 'rank'", "a whole number")),
    (1, {"parts": [BASE, ADAPTER | {"rank": 17}]}, (ONE, "expert 1", "rank 17", "1 to 16", "32 x 16")),
    (1, {"parts": [BASE, ADAPTER | {"rank": 0}]}, ("expert 1", "rank 0", "1 to 16")),
    (1, {"parts": [BASE, ADAPTER | {"rank": True}]}, ("'rank' is True", "a whole number")),
    (1, {"parts": [BASE, ADAPTER | {"rank": 4.0}]}, ("'rank' is 4.0", "a whole number")),
    (1, {"parts": [BASE, ADAPTER | {"ranks": 4}]}, ("unknown entry 'ranks'", "did you mean 'rank'")),
    (1, {"parts": [BASE, ADAPTER | {"start": "svg"}]}, ("expert 1", "unknown start 'svg'", "did you mean 'svd'")),
    (1, {"parts": [BASE | {"base": 2}]}, ("expert 1", "base 2", "the layer has 2 bases, numbered from 0")),
    (1, {"parts": [BASE | {"base": -1}]}, ("expert 1", "base -1")),
    (1, {"parts": [BASE | {"base": None}]}, ("'base' is None",)),
    (1, {"parts": [OWN, ADAPTER]}, ("expert 1", "keeps its own weights and has rank 4 (gaussian) too")),
    (1, {"parts": [BASE, ADAPTER, ADAPTER]}, ("expert 1", "two parts of the kind 'low_rank'")),
    (3, {"parts": [BASE]}, ("base 1 is used by no expert", "remove it")),
]


@pytest.mark.parametrize(("expert", "change", "words"), EXPERT_EDITS)
def test_bad_expert_lines(expert: int, change: dict, words: tuple[str, ...]) -> None:
    edited = data()
    layer(edited)["experts"][expert] |= change
    refused(edited, *words)


BASE_EDITS = [
    ({"experts": [3, 8]}, (ONE, "base 1", "unknown expert 8", "0 to 7")),
    ({"experts": [3, -1]}, ("unknown expert -1",)),
    ({"experts": [3, "6"]}, ("unknown expert '6'",)),
    ({"experts": [3, True]}, ("unknown expert True",)),
    ({"experts": [3, [6]]}, ("unknown expert [6]",)),
    ({"experts": [3, 3]}, ("base 1 names an expert twice: [3, 3]",)),
    ({"experts": [3]}, ("base 1 has 1 experts and 2 weights",)),
    ({"experts": [], "weights": []}, ("base 1 has 0 experts and 0 weights", "at least one")),
    ({"weights": [0.5, 0.4]}, ("base 1 has weights [0.5, 0.4]", "sum to 1")),
    ({"weights": [1.5, -0.5]}, ("at least 0 and sum to 1",)),
    ({"weights": [float("nan"), 1.0]}, ("base 1 has weights [nan",)),
    ({"weights": [float("inf"), 0.0]}, ("base 1 has weights [inf",)),
    ({"weights": [10**400, 0]}, ("base 1 has weights",)),
    ({"weights": ["1", 0]}, ("base 1 has weights ['1', 0]",)),
    ({"weights": [True, 0]}, ("base 1 has weights [True, 0]",)),
    ({"weights": [1]}, ("base 1 has 2 experts and 1 weights",)),
    ({"weights": 1}, ("base 1", "'weights' is 1", "a list")),
    ({"align": 1}, ("base 1", "'align' is 1", "true or false")),
    ({"aligned": True}, ("unknown entry 'aligned'", "did you mean 'align'")),
]


@pytest.mark.parametrize(("change", "words"), BASE_EDITS)
def test_bad_bases(change: dict, words: tuple[str, ...]) -> None:
    edited = data()
    layer(edited)["bases"][1] |= change
    refused(edited, *words)


def routed() -> Plan:
    """`everything` with a policy in its first layer."""
    return with_routing(everything(), {ONE: MainWithVectors(1, "hidden", True)}, SHAPE)


ROUTING_EDITS = [
    ({"main": 3}, (ONE, "routing has main 3", "1 to 2")),
    ({"main": 0}, ("main 0", "1 to 2")),
    ({"main": True}, ("'main' is True", "a whole number")),
    ({"vectors": "hiden"}, (ONE, "unknown kind of vectors 'hiden'", "did you mean 'hidden'")),
    ({"vectors": 1}, ("'vectors' is 1", "text")),
    ({"renormalise": 1}, ("'renormalise' is 1", "true or false")),
    ({"renormalize": True}, ("unknown entry 'renormalize'", "did you mean 'renormalise'")),
]


@pytest.mark.parametrize(("change", "words"), ROUTING_EDITS)
def test_bad_policies(change: dict, words: tuple[str, ...]) -> None:
    edited = json.loads(routed().dumps())
    layer(edited)["policy"] |= change
    refused(edited, *words)


def test_a_policy_in_a_plan() -> None:
    plan = routed()
    text = plan.dumps()
    assert Plan.loads(text) == plan and Plan.loads(text).dumps() == text and plan.id != everything().id
    said = '{"policy": "main_with_vectors", "main": 1, "vectors": "hidden", "renormalise": true}'
    assert f'  "policy": {said},\n' in text
    assert "policy" not in everything().dumps()
    assert diff(everything(), plan) == [f"{ONE} routing: all -> 1 main, vectors hidden, weights renormalised"]
    survivors = len(plan.layers[0].survivors)
    assert plan.size(SHAPE).parameters == everything().size(SHAPE).parameters + survivors * 32
    assert plan.layers[0].slots == everything().layers[0].slots and plan.layers[1] == everything().layers[1]
    edited = json.loads(text)
    del layer(edited)["policy"]["main"]
    refused(edited, ONE, "lacks the entry 'main'")
    layer(edited)["policy"] = [1]
    refused(edited, "'policy' is [1]", "an object")


def test_a_policy_alone_makes_a_plan_of_kept_experts() -> None:
    plan = with_routing(make_plan(SHAPE, ()), {TWO: MainWithVectors(2)}, SHAPE)
    assert plan.layers == (LayerPlan(TWO, (KEPT,) * 8, routing=MainWithVectors(2)),)
    only = plan.layers[0]
    assert not only.is_identity and not only.is_dense and only.keeps_experts and not plan.is_stock(SHAPE)
    with pytest.raises(PlanError, match="1 to 2"):
        with_routing(plan, {TWO: MainWithVectors(3)}, SHAPE)


TOP_EDITS = [
    ({"kind": "plan"}, ("plan x.json", "not a Locum plan", '"kind": "locum-plan"')),
    ({"format_version": 3}, ("format version 3", "reads versions 1 and 2")),
    ({"format_version": "1"}, ("format version '1'",)),
    ({"format_version": True}, ("format version True",)),
    ({"shape_fingerprint": "0"}, ("made for another model", ONE, "make a plan")),
    ({"layer": []}, ("unknown entry 'layer'", "did you mean 'layers'")),
    ({"options": []}, ("'options' is []", "an object")),
    ({"provenance": "me"}, ("'provenance' is 'me'",)),
    ({"layers": {}}, ("'layers' is {}", "a list")),
    ({"layers": [3]}, ("a layer is 3", "an object")),
    ({"layers": [{"layer": ONE}]}, ("lacks the entry 'experts'",)),
    ({"layers": [{"layer": ONE, "experts": [3]}]}, (ONE, "line 0 of the experts is 3")),
    ({"layers": [{"layer": ONE, "experts": []}]}, (ONE, "lists 0 experts, the model has 8 (0 to 7)")),
]


@pytest.mark.parametrize(("change", "words"), TOP_EDITS)
def test_bad_top_level(change: dict, words: tuple[str, ...]) -> None:
    refused(data() | change, *words)


def test_other_nonsense() -> None:
    edited = data()
    del layer(edited)["experts"][5]
    refused(edited, ONE, "expert 5 is missing")
    edited = data()
    del layer(edited)["experts"][7]
    refused(edited, ONE, "lists 7 experts, the model has 8")
    edited = data()
    layer(edited, 1)["layer"] = ONE
    refused(edited, ONE, "twice")
    edited = data()
    layer(edited, 1)["layer"] = "model.layers.7.experts"
    refused(edited, "unknown layer in the plan 'model.layers.7.experts'", "did you mean", TWO)
    edited = data()
    layer(edited)["experts"] = [
        {"expert": e, "parts": [OWN]} if e == 3 else {"expert": e, "dropped": True} for e in range(8)
    ]
    layer(edited)["bases"] = []
    refused(edited, ONE, "leaves 1 experts", "top_k=2", "at least 2")


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", '"plan"', "{'kind': 'locum-plan'}", '{"kind": "locum-plan"']
)
def test_text_that_is_no_plan(text: str) -> None:
    refused(text, "plan x.json", "not")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"kind": "locum-plan", "format_version": ' + "1" * 5000 + "}"])
def test_text_that_no_parser_likes(text: str) -> None:
    refused(text, "plan x.json", "not valid JSON")


def test_position_of_a_syntax_error_is_told() -> None:
    refused(
        everything().dumps().replace('"part": "own_weights"', '"part": own_weights', 1),
        "not valid JSON",
        "line",
        "column",
    )


def test_an_entry_that_is_there_twice_is_refused() -> None:
    text = everything().dumps().replace('"rank": 4, ', '"rank": 4, "rank": 8, ', 1)
    refused(text.replace('"rank": 4, "rank": 8', '"rank": 4, "rank": 8'), "entry 'rank' is there twice")


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every entry and item inside."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(child, dict | list) and key not in ("options", "provenance"):
            yield from places(child, (*path, key))


@pytest.mark.journeys
def test_deleting_or_retyping_anything_is_a_plan_error_or_still_a_plan() -> None:
    """Every key and item in turn, deleted and replaced by values of every type: never another kind of exception."""
    tried = errors = 0
    for path in places(data()):
        for value in ("delete", None, True, 7, -1, 1.5, "x", "", [], [1], [[]], {}, {"a": 1}, 10**30, float("nan")):
            edited = data()
            parent = edited
            for key in path[:-1]:
                parent = parent[key]
            before = copy.deepcopy(parent)
            if value == "delete":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            tried += 1
            try:
                plan = read(edited)
            except PlanError as error:
                errors += 1
                assert "plan" in str(error)
            else:
                assert plan.size(SHAPE).parameters > 0 and Plan.loads(plan.dumps()) == plan
                assert value == "delete" or type(value) is type(before[path[-1]]), (path, value)
    assert tried > 1300 and errors > 0.9 * tried


def test_plans_made_in_python_are_checked_too() -> None:
    for bad in (
        Slot((OwnWeights(), LowRank(2))),
        stand_in(rank=True),
        stand_in(base="0"),
        Slot((OwnWeights(),), survives=False),
    ):
        with pytest.raises(PlanError):
            make_plan(SHAPE, [LayerPlan(ONE, (bad, *(KEPT,) * 7), ())])


def test_group_limited_routers_need_equal_groups() -> None:
    shape = toy_shape(layers=1, experts=8, top_k=2, num_groups=2, min_per_group=2)

    def drop(*dropped: int) -> Plan:
        return make_plan(shape, [LayerPlan(ONE, tuple(DROPPED if e in dropped else KEPT for e in range(8)))])

    assert drop(0, 4).layers[0].survivors == (1, 2, 3, 5, 6, 7)
    with pytest.raises(PlanError, match=r"leaves \[2, 4\] experts in the router's 2 groups.*equally many"):
        drop(0, 1)
    with pytest.raises(PlanError, match="1 experts in each of the router's 2 groups; keep at least 2"):
        drop(0, 1, 2, 4, 5, 6)


def test_a_plan_fits_a_fine_tune_but_no_other_model() -> None:
    plan = everything()
    tuned = dataclasses.replace(SHAPE, parameters=1, bytes=2, notes=("tuned",))
    assert plan.validate(tuned) is plan
    for change in ({"num_experts": 9}, {"top_k": 3}, {"hidden_size": 64}, {"expert_width": 8}, {"num_groups": 2}):
        other = dataclasses.replace(SHAPE, layers=(dataclasses.replace(SHAPE.layers[0], **change), SHAPE.layers[1]))
        with pytest.raises(PlanError, match="made for another model"):
            plan.validate(other)
    with pytest.raises(PlanError, match="made for another model: toy"):
        plan.validate(dataclasses.replace(SHAPE, model_type="other"))


def test_shapes_survive_json() -> None:
    again = ModelShape.from_json(json.loads(json.dumps(SHAPE.to_json())))
    assert again == SHAPE and again.fingerprint == SHAPE.fingerprint


def test_diff() -> None:
    plan = everything()
    assert diff(plan, plan) == [] and diff(plan, with_provenance(plan, seed=9)) == []
    edited = data()
    layer(edited)["experts"][0] = {"expert": 0, "dropped": True}
    layer(edited)["experts"][1]["parts"][1]["rank"] = 8
    layer(edited)["bases"][1]["weights"] = [0.5, 0.5]
    other = read(edited)
    assert diff(plan, other) == [
        f"{ONE} expert 0: kept -> dropped",
        f"{ONE} expert 1: stand_in: base 0 + rank 4 (gaussian) -> stand_in: base 0 + rank 8 (gaussian)",
        f"{ONE} base 1: 0.333333 x expert 3 + 0.666667 x expert 6 -> 0.5 x expert 3 + 0.5 x expert 6",
    ]
    short = make_plan(SHAPE, plan.layers[:1])
    assert diff(plan, short) == [f"{TWO}: only in the first plan"]
    assert diff(short, plan) == [f"{TWO}: only in the second plan"]
    plain = make_plan(SHAPE, [LayerPlan(ONE, (KEPT,) * 8), plan.layers[1]])
    assert f"{ONE} base 0: 0.25 x expert 1 + 0.75 x expert 2, aligned -> none" in diff(plan, plain)


# --- sizes ------------------------------------------------------------------------------------------------------


def test_size_by_hand() -> None:
    """Width 32 x 16: an expert has 3 * 512 = 1536 parameters, an adapter of rank r has 3 r (32 + 16) = 144 r."""
    plan = everything()
    expert = 1536
    one = (1 + 2) * expert + 144 * (4 + 2 + 3) + 2 * 32
    two = 7 * expert
    size = plan.size(SHAPE)
    assert size.expert_parameters == one + two
    assert size.parameters == SHAPE.parameters - 16 * expert + one + two
    assert size.bytes == SHAPE.bytes - 2 * (16 * expert - one - two)
    assert plan.removed(SHAPE) == pytest.approx(1 - (one + two) / (16 * expert), abs=1e-12)
    assert make_plan(SHAPE, ()).removed(SHAPE) == 0


def test_dropping_takes_router_rows_along() -> None:
    layers = tuple(dataclasses.replace(layer, router_numel=33, router_bytes=130) for layer in SHAPE.layers)
    shape = dataclasses.replace(SHAPE, layers=layers)
    size = make_plan(shape, [LayerPlan(ONE, (DROPPED, NOTHING, *(KEPT,) * 6))]).size(shape)
    assert size.parameters == shape.parameters - 2 * 1536 - 33 and size.bytes == shape.bytes - 2 * 2 * 1536 - 130


def test_shapes_without_gate_and_with_biases() -> None:
    plain = LayerShape("x", 4, 1, 10, 6, "r", "softmax", True, has_gate=False)
    biased = dataclasses.replace(plain, has_gate=True, has_bias=True)
    assert plain.parameters() == 2 * 60 and plain.adapter_parameters(2) == 2 * 2 * 16 and plain.gate_width == 6
    assert biased.parameters() == 3 * 60 + 2 * 6 + 10 and biased.parameters(3) == 3 * 30 + 2 * 3 + 10
    assert biased.adapter_parameters(2) == 3 * 2 * 16 and biased.gate_width == 12


def plans_for(shape: ModelShape) -> dict[str, list[LayerPlan]]:
    first, rest = shape.layers[0], shape.layers[1:]
    mixed = (
        KEPT,
        stand_in(base=0, rank=4),
        stand_in(base=0, rank=2, start="svd"),
        stand_in(base=1, constant=True),
        stand_in(constant=True),
        NOTHING,
        stand_in(rank=3, start="svd"),
        KEPT,
    )
    bases = (Base((1, 2), (0.25, 0.75), True), Base((3,), (1.0,)))
    return {
        "identity": [LayerPlan(layer.name, (KEPT,) * 8) for layer in shape.layers],
        "uniform": [LayerPlan(layer.name, (DROPPED, KEPT, KEPT, KEPT) * 2) for layer in shape.layers],
        "uneven": [LayerPlan(first.name, (DROPPED, KEPT, KEPT, KEPT) * 2)],
        "mixed": [LayerPlan(first.name, mixed, bases)],
        "no dense": [LayerPlan(layer.name, (stand_in(rank=1, start="svd"),) * 8) for layer in rest],
        "nothing": [LayerPlan(first.name, (NOTHING,) * 8)],
    }


@pytest.mark.parametrize("kind", ["identity", "uniform", "uneven", "mixed", "no dense", "nothing"])
@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_size_equals_the_tensors_that_are_there(model_type: str, kind: str) -> None:
    model = tiny_model(model_type)
    shape = shape_of(model)
    assert shape.parameters == sum(t.numel() for t in model.state_dict().values())
    plan = make_plan(shape, plans_for(shape)[kind])
    expected, removed = plan.size(shape), plan.removed(shape)
    zeros = [torch.zeros(s.num_experts, s.hidden_size) for s in shape.layers]
    apply_plan(model, plan, with_sums(shape, output_sum=zeros, count=[z[:, 0] for z in zeros]))
    tensors = list(model.state_dict().values())
    experts = sum(t.numel() for found in find_layers(model) for t in found.experts.state_dict().values())
    assert expected.parameters == sum(t.numel() for t in tensors)
    assert expected.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert expected.expert_parameters == experts and removed == pytest.approx(1 - experts / shape.expert_parameters)


def test_what_a_stock_checkpoint_can_hold() -> None:
    shape = SHAPE
    plans = {
        "identity": ([LayerPlan(n, (KEPT,) * 8) for n in (ONE, TWO)], True),
        "no layer named": ([], True),
        "same count, other experts": (
            [LayerPlan(ONE, (DROPPED, *(KEPT,) * 7)), LayerPlan(TWO, (*(KEPT,) * 7, DROPPED))],
            True,
        ),
        "counts differ": ([LayerPlan(ONE, (DROPPED, *(KEPT,) * 7)), LayerPlan(TWO, (KEPT,) * 8)], False),
        "one layer only": ([LayerPlan(ONE, (DROPPED, *(KEPT,) * 7))], False),
        "silent experts": ([LayerPlan(n, (NOTHING, *(KEPT,) * 7)) for n in (ONE, TWO)], False),
        "constants": ([LayerPlan(n, (stand_in(constant=True), *(KEPT,) * 7)) for n in (ONE, TWO)], False),
    }
    assert {name: make_plan(shape, layers).is_stock(shape) for name, (layers, _) in plans.items()} == {
        name: stock for name, (_, stock) in plans.items()
    }


def test_every_tiny_family_has_a_shape_that_counts_right() -> None:
    for model_type in CONFIGS:
        model = tiny_model(model_type, num_hidden_layers=1)
        shape = shape_of(model)
        experts = [t.numel() for found in find_layers(model) for t in found.experts.state_dict().values()]
        assert shape.expert_parameters == sum(experts), model_type
