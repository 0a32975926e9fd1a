"""Plan files of version 1, in which a slot had a fate and fixed entries: read, and known again by their ids.

{"expert": 1, "becomes": "stand_in", "base": 0, "rank": 16, "start": "svd", "constant": true}
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import PlanError, unknown
from ..experts.parts.constant import Constant
from ..experts.parts.low_rank import STARTS, LowRank
from ..experts.parts.shared_base import SharedBase
from ..experts.policies.main_with_vectors import MainWithVectors
from .entries import bases_from_json, by_expert, checked
from .layer_plan import DROPPED, KEPT, NOTHING, LayerPlan, Slot, stand_in

LAYER_ENTRIES = {"layer": str, "experts": list, "bases": list, "routing": dict}
ROUTING_ENTRIES = {"main": int, "vectors": str, "renormalise": bool}
SLOT_ENTRIES = {"expert": int, "becomes": str, "base": int, "rank": int, "start": str, "constant": bool}
FATES = {"kept": KEPT, "nothing": NOTHING, "dropped": DROPPED}


def layer_from_json(data: Any, where: str) -> LayerPlan:
    name = checked(data, LAYER_ENTRIES, 2, f"{where}, a layer")["layer"]
    where = f"{where}, layer {name}"
    slots = by_expert(data["experts"], where, _slot_from_json)
    policy = None
    if "routing" in data:
        policy = MainWithVectors(**checked(data["routing"], ROUTING_ENTRIES, 1, f"{where}, routing"))
    return LayerPlan(name, slots, bases_from_json(data.get("bases", ()), where), policy)


def _slot_from_json(entry: dict[str, Any], where: str) -> Slot:
    given = dict(checked(entry, SLOT_ENTRIES, 2, where))
    where, fate = f"{where} (expert {given.pop('expert')})", given.pop("becomes")
    if fate not in (*FATES, "stand_in"):
        raise PlanError(f"{where}: {unknown('fate', fate, (*FATES, 'stand_in'))}")
    start = given.get("start", "gaussian")
    if start not in STARTS:
        raise PlanError(f"{where}: {unknown('start', start, STARTS)}")
    if start != "gaussian" and not given.get("rank"):
        raise PlanError(f"{where} has start {start!r} but no rank, so no adapter to start; give it a rank")
    slot = stand_in(**given)
    if fate == "stand_in" and not slot.parts:
        raise PlanError(f"{where} is a stand_in of nothing; give it a base, a rank or a constant, or make it 'nothing'")
    if fate != "stand_in" and slot.parts:
        parts = " + ".join(map(str, slot.parts))
        raise PlanError(f"{where} is {fate!r} but has {parts}; only a stand_in has such parts")
    return FATES.get(fate, slot)


def layer_to_json(plan: LayerPlan) -> dict[str, Any] | None:
    """What version 1 would say of a layer; None where it cannot."""
    if plan.routing is not None and type(plan.routing) is not MainWithVectors:
        return None
    if plan.top_k is not None or plan.dropped or any(base.merge != "mean" for base in plan.bases):
        return None
    experts = []
    for e, slot in enumerate(plan.slots):
        fate = next((name for name, known in FATES.items() if slot == known), "stand_in")
        entry: dict[str, Any] = {"expert": e, "becomes": fate}
        order = [SharedBase, LowRank, Constant]
        kinds = [type(part) for part in slot.parts]
        if fate == "stand_in" and kinds != [kind for kind in order if kind in kinds]:
            return None
        if any(part.format for part in slot.parts):
            return None
        for part in slot.parts if fate == "stand_in" else ():
            entry |= {"constant": True} if isinstance(part, Constant) else part.to_json()
        experts.append(entry)
    routing = {} if plan.routing is None else {"routing": dataclasses.asdict(plan.routing)}
    bases = [{"experts": list(b.experts), "weights": list(b.weights), "align": b.align} for b in plan.bases]
    return {"layer": plan.layer, **routing, "bases": bases, "experts": experts}
