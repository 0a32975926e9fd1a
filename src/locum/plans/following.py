"""Two plans, one after the other, as one plan over the original; the first one drops experts, or decoder layers, and does nothing else.

Experts and decoder layers that a plan drops are numbered away: the second plan counts those that are left, and is told in the
original's numbers here.
"""

from __future__ import annotations

from dataclasses import replace

from ..shapes import ModelShape
from .layer_plan import KEPT, LayerPlan
from .plan import Plan, make_plan


def only_drops(plan: Plan) -> bool:
    """Whether a plan drops experts and does nothing else."""
    return all(
        layer.routing is None and all(slot.is_untouched or not slot.survives for slot in layer.slots)
        for layer in plan.layers
    )


def following(first: Plan, second: Plan, shape: ModelShape) -> Plan:
    """The plan over the original, of this shape, that gives what `second` makes of what `first` leaves; method, options and
    provenance are those of `second`. Raises ValueError where the first does more than drop experts."""
    if not only_drops(first):
        raise ValueError("the first of two plans may only drop experts")
    layers = []
    for layer in shape.layers:
        one = first.layer(layer.name) or LayerPlan(layer.name, (KEPT,) * layer.num_experts)
        two = None if one.dropped else second.layer(first.numbering.name_after(layer.name))
        layers.append(one if two is None else _of_survivors(one, two))
    return make_plan(shape, layers, method=second.method, options=second.options, provenance=second.provenance)


def _of_survivors(one: LayerPlan, two: LayerPlan) -> LayerPlan:
    slots = list(one.slots)
    for e, slot in zip(one.survivors, two.slots, strict=True):
        slots[e] = slot
    bases = tuple(replace(base, experts=tuple(one.survivors[e] for e in base.experts)) for base in two.bases)
    top_k = None if two.dropped else one.top_k if two.top_k is None else two.top_k
    return replace(two, layer=one.layer, slots=tuple(slots), bases=bases, top_k=top_k)
