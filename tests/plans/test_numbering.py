"""Plans without whole decoder layers: names, sizes, JSON, what follows them, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from locum.checkpoints.application import apply_plan
from locum.errors import PlanError
from locum.models.sizes import shape_of
from locum.plans.following import following, only_drops
from locum.plans.numbering import Numbering
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, Plan, diff, keep_all, make_plan, stand_in
from making.handmade import toy_shape
from making.tiny_models import tiny_ids, tiny_model

SHAPE = toy_shape(layers=4, experts=8, d=16, f=32)


def without(shape, *gone: int, slots=KEPT) -> Plan:
    count = shape.layers[0].num_experts
    layers = [
        LayerPlan.without(x) if i in gone else LayerPlan(x.name, (slots,) * count) for i, x in enumerate(shape.layers)
    ]
    return make_plan(shape, layers)


def test_later_layers_count_without_those_that_are_gone() -> None:
    numbering = Numbering.without(["model.layers.1.mlp.experts", "model.layers.10.mlp.experts"])
    names = {
        "model.layers.0.x": "model.layers.0.x",
        "model.layers.1.x": None,
        "model.layers.2.mlp.3.x": "model.layers.1.mlp.3.x",
        "model.layers.10.x": None,
        "model.layers.12.x": "model.layers.10.x",
        "model.mtp.layers.1.x": "model.mtp.layers.1.x",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: numbering.name_after(name) for name in names} == names
    assert Numbering().name_after("model.layers.1.x") == "model.layers.1.x"
    with pytest.raises(ValueError, match="no one stack"):
        Numbering.without(["model.layers.1.x", "encoder.layers.1.x"])


def test_the_whole_decoder_layer_counts() -> None:
    plan, one = without(SHAPE, 1), SHAPE.layers[1]
    size, experts = plan.size(SHAPE), 8 * one.parameters()
    assert size.expert_parameters == SHAPE.expert_parameters - experts
    assert size.parameters == SHAPE.parameters - experts - 8 * one.router_numel - one.around_numel
    assert size.bytes == SHAPE.bytes - 2 * experts - 8 * one.router_bytes - one.around_bytes
    assert plan.removed(SHAPE) == 0.25 and plan.is_stock(SHAPE)
    assert [layer.name for layer in plan.selecting(SHAPE).layers] == [SHAPE.layers[i].name for i in (0, 2, 3)]
    assert not without(SHAPE, 1, slots=stand_in(rank=2)).is_stock(SHAPE)


def test_it_is_read_and_written_and_told_apart() -> None:
    plan = without(SHAPE, 1)
    assert '"dropped": true,\n' in plan.dumps()
    assert Plan.loads(plan.dumps()) == plan
    assert plan.id != keep_all(SHAPE).id and '"dropped"' not in keep_all(SHAPE).dumps()
    lines = diff(keep_all(SHAPE), plan)
    assert lines[-1] == "model.layers.1.experts decoder layer: stays -> dropped" and len(lines) == 9


def test_the_result_has_the_names_of_afterwards_and_comes_back() -> None:
    plan = without(SHAPE, 0, 2)
    result = plan.of_result()
    assert [layer.layer for layer in result.layers] == ["model.layers.0.experts", "model.layers.1.experts"]
    changed = replace(result.layers[1], slots=(stand_in(rank=2),) * 8)
    back = plan.with_result(replace(result, layers=(result.layers[0], changed)))
    assert back.layers[3] == replace(changed, layer="model.layers.3.experts")
    assert back.layers[:3] == plan.layers[:3] and plan.with_result(result) is plan
    assert keep_all(SHAPE).of_result() == keep_all(SHAPE)


def test_one_after_the_other_is_one_plan() -> None:
    """Layer 1 of four goes, then of the others experts, then the second of the three that are left, once layer 2."""
    model = tiny_model("olmoe", num_hidden_layers=4)
    shape, ids = shape_of(model), tiny_ids()
    first = without(shape, 1)
    left = apply_plan(copy.deepcopy(model), first)
    some = (DROPPED, *(KEPT,) * 6, DROPPED)
    second = make_plan(shape_of(left), [LayerPlan(x.name, some) for x in shape_of(left).layers])
    joined = following(first, second, shape)
    assert [layer.dropped for layer in joined.layers] == [False, True, False, False] and only_drops(joined)
    left = apply_plan(left, second)
    third = without(shape_of(left), 1)
    joined = following(joined, third, shape)
    assert [layer.dropped for layer in joined.layers] == [False, True, True, False] and joined.layers[3].slots == some
    one, two = apply_plan(left, third), apply_plan(model, joined)
    assert one.config.num_hidden_layers == two.config.num_hidden_layers == 2
    assert joined.size(shape).bytes == shape_of(two).bytes
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


@pytest.mark.parametrize(
    "layer, words",
    [
        (replace(LayerPlan.without(SHAPE.layers[0]), slots=(KEPT, *(DROPPED,) * 7)), "has something left"),
        (replace(LayerPlan.without(SHAPE.layers[0]), slots=(DROPPED,) * 9), "lists 9 experts"),
        (replace(LayerPlan.without(SHAPE.layers[0]), bases=(Base((0,), (1.0,)),)), "has something left"),
        (replace(LayerPlan.without(SHAPE.layers[0]), top_k=1), "has something left"),
        (LayerPlan(SHAPE.layers[0].name, (DROPPED,) * 8), "leaves 0 experts"),
    ],
)
def test_a_layer_that_goes_has_nothing_left(layer: LayerPlan, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_plan(SHAPE, [layer])


def test_what_cannot_go_is_refused() -> None:
    with pytest.raises(PlanError, match="drops the decoder layers of all experts"):
        without(SHAPE, 0, 1, 2, 3)
    for change, words in (({"around_numel": 0}, "is not known"), ({"expert_bytes": 7}, "is quantised")):
        odd = replace(SHAPE, layers=tuple(replace(layer, **change) for layer in SHAPE.layers))
        with pytest.raises(PlanError, match=words):
            without(odd, 1)
    assert make_plan(SHAPE, [LayerPlan.without(SHAPE.layers[0])]).is_stock(SHAPE)
