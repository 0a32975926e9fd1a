"""The plan's JSON: one line for every expert, so that people can read, edit and diff it.

    {"kind": "locum-plan", "format_version": 2, "model_type": ..., "shape_fingerprint": ..., "method": ..., "options": {},
     "provenance": {}, "layers": [
      {"layer": "model.layers.0.mlp.experts",
       "policy": {"policy": "main_with_vectors", "main": 2, ...},                 where the layer has one
       "top_k": 2,                                                                where its router selects fewer than before
       "dropped": true,                                                           where its decoder layer goes, and all experts with it
       "bases": [{"experts": [1, 3], "weights": [0.75, 0.25], "align": false}],
       "experts": [
        {"expert": 0, "parts": [{"part": "own_weights"}]},                        kept
        {"expert": 1, "parts": [{"part": "shared_base", "base": 0}, {"part": "low_rank", "rank": 16, "start": "svd"}]},
        {"expert": 2, "parts": []},                                               its output is zero
        {"expert": 3, "dropped": true}]}]}

What stands beside "part" and "policy" are the fields of that kind (experts/parts/, experts/policies/), of whichever
package; of a part in few bits also "format" and "quantiser": {"part": "own_weights", "format": "int4-g32", "quantiser": "gptq"}. A base
that is no mean of weights has "merge" too, the way in which it is made.
Files of version 1 are read too (version_1.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError, PlanError
from ..experts.parts.part import PARTS
from ..experts.policies.policy import POLICIES
from ..json_text import parse_json
from ..registry import Registry
from . import version_1
from .entries import bases_from_json, by_expert, checked, once
from .layer_plan import LayerPlan, Slot

FORMAT_VERSION = 2
PLAN_ENTRIES = {
    "kind": str,
    "format_version": int,
    "model_type": str,
    "shape_fingerprint": str,
    "layers": list,
    "method": str,
    "options": dict,
    "provenance": dict,
}
LAYER_ENTRIES = {"layer": str, "experts": list, "bases": list, "policy": dict, "top_k": int, "dropped": bool}


def layer_to_json(plan: LayerPlan) -> dict[str, Any]:
    bases = [
        {"experts": list(b.experts), "weights": list(b.weights), "align": b.align}
        | ({"merge": b.merge} if b.merge != "mean" else {})
        for b in plan.bases
    ]
    experts: list[dict[str, Any]] = []
    for e, slot in enumerate(plan.slots):
        parts = [{"part": part.name, **part.to_json()} for part in slot.parts]
        experts.append({"expert": e, "parts": parts} if slot.survives else {"expert": e, "dropped": True})
    policy = {}
    if plan.routing is not None:
        policy = {"policy": plan.routing.to_json()}
    top_k = {} if plan.top_k is None else {"top_k": plan.top_k}
    dropped = {"dropped": True} if plan.dropped else {}
    return {"layer": plan.layer, **policy, **top_k, **dropped, "bases": bases, "experts": experts}


def fingerprint_layers(layers: Sequence[LayerPlan]) -> str:
    """A short hash of what layers become. Plans that version 1 could say have the hash that they had there."""
    old = [version_1.layer_to_json(layer) for layer in layers]
    said = [layer_to_json(layer) for layer in layers] if None in old else old
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def dumps(plan: Mapping[str, Any]) -> str:
    """The text of a plan's fields."""
    names = ("model_type", "shape_fingerprint", "method", "options", "provenance")
    head = {"kind": "locum-plan", "format_version": FORMAT_VERSION, **{name: plan[name] for name in names}}
    layers = []
    for layer in plan["layers"]:
        data = layer_to_json(layer)
        bases = ",\n   ".join(json.dumps(base) for base in data["bases"])
        experts = ",\n   ".join(json.dumps(expert) for expert in data["experts"])
        name = f'  {{"layer": {json.dumps(layer.layer)},\n'
        said = "".join(
            f'  "{key}": {json.dumps(data[key])},\n' for key in ("policy", "top_k", "dropped") if key in data
        )
        layers.append(f'{name}{said}  "bases": [\n   {bases}],\n  "experts": [\n   {experts}]}}')
    text = json.dumps(head, indent=1)
    return text[: text.rindex("\n}")] + ',\n "layers": [\n' + ",\n".join(layers) + "\n ]\n}\n"


def loads(text: str, where: str) -> dict[str, Any]:
    """The fields of a plan from its text. Raises PlanError for anything else."""
    try:
        data = parse_json(text, object_pairs_hook=lambda pairs: once(pairs, where))
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != "locum-plan":
        raise PlanError(f'{where} is not a Locum plan: expected a JSON object with "kind": "locum-plan"')
    version = data.get("format_version")
    readers = {1: version_1.layer_from_json, FORMAT_VERSION: layer_from_json}
    if type(version) is not int or version not in readers:
        raise PlanError(f"{where} has format version {version!r}; this Locum reads versions 1 and {FORMAT_VERSION}")
    given = dict(checked(data, PLAN_ENTRIES, 5, where))
    del given["kind"], given["format_version"]
    return given | {"layers": tuple(readers[version](layer, where) for layer in data["layers"])}


def layer_from_json(data: Any, where: str) -> LayerPlan:
    name = checked(data, LAYER_ENTRIES, 2, f"{where}, a layer")["layer"]
    where = f"{where}, layer {name}"
    slots = by_expert(data["experts"], where, _slot_from_json)
    bases = bases_from_json(data.get("bases", ()), where)
    policy = _kind_from_json(data["policy"], POLICIES, "policy", f"{where}, policy") if "policy" in data else None
    return LayerPlan(name, slots, bases, policy, data.get("top_k"), data.get("dropped", False))


def _slot_from_json(entry: dict[str, Any], where: str) -> Slot:
    given = checked(entry, {"expert": int, "parts": list, "dropped": bool}, 1, where)
    if ("parts" in given) == given.get("dropped", False):
        raise PlanError(f'{where} needs either "parts", a list, or "dropped": true')
    parts = given.get("parts", [])
    return Slot(tuple(_kind_from_json(p, PARTS, "part", f"{where}, a part") for p in parts), "parts" in given)


def _kind_from_json(data: Any, registry: Registry[Any], key: str, where: str) -> Any:
    """A part or a policy of the kind that its entry names, from the fields that it has."""
    if not isinstance(data, dict) or type(data.get(key)) is not str:
        raise PlanError(f'{where} is {data!r:.60}; it must be an object {{...}} with "{key}": "NAME"')
    try:
        kind = registry[data[key]]
    except OptionError as error:
        raise PlanError(f"{where}: {error}; install the package that has it, if it is not Locum's own") from error
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    names = sorted((f.name for f in fields), key=lambda name: name not in required)
    given = {name: value for name, value in data.items() if name != key}
    types = {name: list if typing.get_origin(hints[name]) is tuple else hints[name] for name in names}
    fields_ = checked(given, types, len(required), f"{where} ({data[key]})")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields_.items()})
    except (OptionError, KeyError, TypeError) as error:  # of a policy inside of it
        raise PlanError(f"{where} ({data[key]}) cannot be read: {error}") from error
