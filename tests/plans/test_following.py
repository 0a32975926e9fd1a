"""Two plans as one: the same fates, bases and sizes as one after the other, and what cannot come first is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from locum.checkpoints.application import apply_plan
from locum.models.sizes import shape_of
from locum.plans.following import following, only_drops
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Plan, keep_all, make_plan, stand_in
from locum.shapes import ModelShape
from making.tiny_models import tiny_ids, tiny_model


def dropping(shape: ModelShape, *gone: tuple[int, ...]) -> Plan:
    layers = [
        LayerPlan(layer.name, tuple(DROPPED if e in out else KEPT for e in range(layer.num_experts)))
        for layer, out in zip(shape.layers, gone, strict=True)
    ]
    return make_plan(shape, layers)


def test_it_gives_the_bits_of_one_plan_after_the_other() -> None:
    """Experts 1 and 4 go, then of those left 0 goes, 1 says nothing, and 2 and 5 become one: 0, 2, and 3 and 7 of the original."""
    model = tiny_model("olmoe")
    shape, ids = shape_of(model), tiny_ids()
    first = dropping(shape, (1, 4), (0, 2))
    left = apply_plan(copy.deepcopy(model), first)
    merged = stand_in(base=0)
    slots = (DROPPED, NOTHING, merged, KEPT, KEPT, merged)
    layers = [LayerPlan(layer.name, slots, (Base((2, 5), (0.25, 0.75)),)) for layer in shape.layers]
    second = make_plan(shape_of(left), layers, method="by hand", options={"x": 1}, provenance={"seed": 3})
    joined = following(first, second, shape)
    assert joined.layers[0].slots == (DROPPED, DROPPED, NOTHING, merged, DROPPED, KEPT, KEPT, merged)
    assert joined.layers[0].bases == (Base((3, 7), (0.25, 0.75)),) and joined.layers[1].bases[0].experts == (4, 7)
    assert (joined.options, joined.provenance) == ({"x": 1}, {"seed": 3})
    assert joined.size(shape) == second.size(replace(shape_of(left)))
    one, two = apply_plan(left, second), apply_plan(model, joined)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_what_a_plan_leaves_out_stays_as_it_is() -> None:
    shape = shape_of(tiny_model("olmoe"))
    first = dropping(shape, (1, 4), (0, 2))
    nothing = replace(keep_all(shape), layers=())
    assert following(first, nothing, shape).layers == first.layers
    assert following(nothing, first, shape).layers == first.layers
    assert only_drops(first) and only_drops(keep_all(shape))


@pytest.mark.parametrize("slot", [NOTHING, stand_in(rank=2), stand_in(constant=True)], ids=str)
def test_only_what_drops_may_come_first(slot) -> None:
    shape = shape_of(tiny_model("olmoe"))
    first = make_plan(shape, [LayerPlan(shape.layers[0].name, (slot, *(KEPT,) * 7))])
    assert not only_drops(first)
    with pytest.raises(ValueError, match="may only drop"):
        following(first, keep_all(shape), shape)
