"""The plan: what becomes of every expert of every layer. A small JSON file; it never holds weights.

Every surviving expert of a layer computes (design.md section 1.3)

    y(x) = W_down [act(W_gate x) * (W_up x)] + c,    W = base + B A    for each of the three projections

and a `Slot` says which of these parts it has:

    kept       its own weights, unchanged
    stand_in   a shared base and/or a rank-r adapter and/or a constant (its mean output)
    nothing    its router row stays, its output is zero
    dropped    its router row goes too: the remaining logits are normalised by the model's own rule

A layer may also have a `Routing`: how many of the experts that the router selects run, and what the others leave behind.

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import PlanError, unknown
from ..experts.routing import VECTORS, Routing
from ..shapes import LayerShape, ModelShape

FORMAT_VERSION = 1
BECOMES = ("kept", "stand_in", "nothing", "dropped")
START_NEEDS = {"gaussian": (), "svd": (), "whitened": ("input_gram", "hidden_gram")}  # statistics that building reads
STARTS = tuple(START_NEEDS)
KINDS = {str: "text", int: "a whole number", bool: "true or false", dict: "an object {...}", list: "a list [...]"}
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
LAYER_ENTRIES = {"layer": str, "experts": list, "bases": list, "routing": dict}
ROUTING_ENTRIES = {"main": int, "vectors": str, "renormalise": bool}
BASE_ENTRIES = {"experts": list, "weights": list, "align": bool}
SLOT_ENTRIES = {"becomes": str, "base": int, "rank": int, "start": str, "constant": bool}


@dataclass(frozen=True)
class Slot:
    """What becomes of one expert."""

    becomes: str = "kept"
    base: int | None = None  # index into the layer's bases
    rank: int = 0  # of the adapter on every projection; 0 means none
    start: str = "gaussian"  # adapter: A gaussian and B zero, or the SVD (plain, whitened) of what the base leaves over
    constant: bool = False  # adds the expert's mean output on the calibration tokens

    @property
    def survives(self) -> bool:
        return self.becomes != "dropped"

    @property
    def parts(self) -> str:
        """What the stand-in is made of, in words: "base 0 + rank 16 (gaussian)"."""
        base = [] if self.base is None else [f"base {self.base}"]
        adapter = [f"rank {self.rank} ({self.start})"] if self.rank else []
        return " + ".join(base + adapter + ["constant"] * self.constant)

    def __str__(self) -> str:
        return f"{self.becomes}: {self.parts}" if self.parts else self.becomes


KEPT, NOTHING, DROPPED = Slot(), Slot("nothing"), Slot("dropped")


@dataclass(frozen=True)
class Base:
    """One shared base: the weighted mean of some experts' weights (LightMoE Eq. 4)."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]  # at least 0, sum to one
    align: bool = False  # permute each expert's hidden units to the heaviest one's before averaging

    def __str__(self) -> str:
        terms = [f"{weight:.6g} x expert {e}" for e, weight in zip(self.experts, self.weights, strict=True)]
        return " + ".join(terms) + (", aligned" if self.align else "")


@dataclass(frozen=True)
class LayerPlan:
    """One layer: a slot for every expert, in the order of the original indices, and the bases they share."""

    layer: str
    slots: tuple[Slot, ...]
    bases: tuple[Base, ...] = ()
    routing: Routing | None = None  # None: every selected expert runs

    @property
    def survivors(self) -> tuple[int, ...]:
        """Original indices of the experts that the router can still choose; their position is the new index."""
        return tuple(e for e, slot in enumerate(self.slots) if slot.survives)

    @property
    def replaced(self) -> tuple[int, ...]:
        return tuple(e for e, slot in enumerate(self.slots) if slot.becomes in ("stand_in", "nothing"))

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that building the layer reads."""
        constants = ("output_sum", "count") if any(slot.constant for slot in self.slots) else ()
        starts = dict.fromkeys(slot.start for slot in self.slots if slot.rank)
        return (*constants, *(name for start in starts for name in START_NEEDS[start]))

    @property
    def is_identity(self) -> bool:
        return self.keeps_experts and self.routing is None

    @property
    def keeps_experts(self) -> bool:
        return all(slot.becomes == "kept" for slot in self.slots)

    @property
    def is_dense(self) -> bool:
        """Whether a stock layer can hold it: every survivor keeps its own full weights, and all selected ones run."""
        return self.routing is None and all(slot.becomes in ("kept", "dropped") for slot in self.slots)

    def parameters(self, shape: LayerShape) -> int:
        """Parameters of the routed experts afterwards: dense experts, bases, adapters, own biases, constants, vectors.

        A low-rank stand-in without a base keeps the biases of the expert it stands in for.
        """
        dense = sum(slot.becomes == "kept" for slot in self.slots) + len(self.bases)
        constants = sum(slot.constant for slot in self.slots) * shape.hidden_size
        biases = sum(slot.rank > 0 and slot.base is None for slot in self.slots) * shape.bias_parameters()
        stacked = dense * shape.parameters() + self.adapter_parameters(shape) + biases + constants
        return stacked + self.vector_parameters(shape)

    def adapter_parameters(self, shape: LayerShape) -> int:
        return sum(shape.adapter_parameters(slot.rank) for slot in self.slots)

    def vector_parameters(self, shape: LayerShape) -> int:
        """Parameters of what auxiliary experts leave behind."""
        if self.routing is None:
            return 0
        sizes = (len(self.survivors), shape.hidden_size, shape.expert_width, shape.has_gate)
        return math.prod(self.routing.offsets_shape(*sizes) or (0,))


@dataclass(frozen=True)
class Size:
    """Exact counts of a checkpoint; `bytes` are those of its tensors, file headers not counted."""

    parameters: int
    bytes: int
    expert_parameters: int


@dataclass(frozen=True)
class Plan:
    """A whole plan. `shape_fingerprint` ties it to models whose MoE layers have the shape it was made for."""

    model_type: str
    shape_fingerprint: str
    layers: tuple[LayerPlan, ...]
    method: str = "by hand"
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        """A short hash of what the plan does, whoever made it."""
        return hashlib.sha256(json.dumps([_layer_to_json(p) for p in self.layers]).encode()).hexdigest()[:12]

    @property
    def needs_constants(self) -> bool:
        return any(slot.constant for layer in self.layers for slot in layer.slots)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that building reads: for constants (mean outputs) and for whitened adapters (Grams)."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.needs))

    @property
    def keeps_experts(self) -> bool:
        """Whether every expert stays as it is, so that at most the routing changes."""
        return all(layer.keeps_experts for layer in self.layers)

    def layer(self, name: str) -> LayerPlan | None:
        return next((layer for layer in self.layers if layer.layer == name), None)

    def is_stock(self, shape: ModelShape) -> bool:
        """Whether a stock checkpoint can hold the result: dense layers, equally many experts in each of them."""
        if not all(layer.is_dense for layer in self.layers):
            return False
        counts = {layer.name: layer.num_experts for layer in shape.layers}
        counts |= {layer.layer: len(layer.survivors) for layer in self.layers}
        can = all(x.stock_can_drop or counts[x.name] == x.num_experts for x in shape.layers)
        return can and len(set(counts.values())) == 1

    def size(self, shape: ModelShape, adapter_itemsize: int | None = None) -> Size:
        """Exact size of the result. `adapter_itemsize` counts adapters at another width (LightMoE Table 8: 4 bytes)."""
        expert_parameters, parameters, bytes_ = shape.expert_parameters, shape.parameters, shape.bytes
        extra = (adapter_itemsize or shape.expert_itemsize) - shape.expert_itemsize
        for plan in self.layers:
            layer = shape.layer(plan.layer)
            change = plan.parameters(layer) - layer.num_experts * layer.parameters()
            dropped = layer.num_experts - len(plan.survivors)
            expert_parameters += change
            parameters += change - dropped * layer.router_numel
            bytes_ += change * shape.expert_itemsize - dropped * layer.router_bytes
            bytes_ += plan.adapter_parameters(layer) * extra
        return Size(parameters, bytes_, expert_parameters)

    def removed(self, shape: ModelShape) -> float:
        """The fraction of the routed experts' parameters that the plan removes."""
        return 1 - self.size(shape).expert_parameters / shape.expert_parameters

    def validate(self, shape: ModelShape) -> Plan:
        """Check everything that can be known without weights. Returns the plan; raises PlanError."""
        if self.shape_fingerprint != shape.fingerprint:
            ours = ", ".join(f"{p.layer} with {len(p.slots)} experts" for p in self.layers[:1]) or "no layers"
            theirs = ", ".join(f"{s.name} with {s.num_experts}" for s in shape.layers[:1])
            raise PlanError(
                f"the plan was made for another model: {self.model_type} ({len(self.layers)} layers: {ours} ...), but "
                f"this one is {shape.model_type} ({len(shape.layers)} layers: {theirs} ...); make a plan from "
                f"statistics of this model or of one with the same MoE layers"
            )
        names = [layer.name for layer in shape.layers]
        seen = set()
        for plan in self.layers:
            if plan.layer not in names:
                raise PlanError(unknown("layer in the plan", plan.layer, names))
            if plan.layer in seen:
                raise PlanError(f"layer {plan.layer} is in the plan twice; keep one of the two entries")
            seen.add(plan.layer)
            _validate_layer(plan, shape.layer(plan.layer))
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "locum-plan",
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            "shape_fingerprint": self.shape_fingerprint,
            "method": self.method,
            "options": self.options,
            "provenance": self.provenance,
            "layers": [_layer_to_json(layer) for layer in self.layers],
        }

    def dumps(self) -> str:
        """JSON with one line for every expert, so that people can read, edit and diff it."""
        head = json.dumps({k: v for k, v in self.to_json().items() if k != "layers"}, indent=1)
        layers = []
        for layer in self.layers:
            data = _layer_to_json(layer)
            bases = ",\n   ".join(json.dumps(base) for base in data["bases"])
            experts = ",\n   ".join(json.dumps(expert) for expert in data["experts"])
            name = f'  {{"layer": {json.dumps(layer.layer)},\n'
            routing = f'  "routing": {json.dumps(data["routing"])},\n' if "routing" in data else ""
            layers.append(f'{name}{routing}  "bases": [\n   {bases}],\n  "experts": [\n   {experts}]}}')
        return head[: head.rindex("\n}")] + ',\n "layers": [\n' + ",\n".join(layers) + "\n ]\n}\n"

    @classmethod
    def loads(cls, text: str, where: str = "the plan") -> Plan:
        try:
            data = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
        except PlanError:
            raise
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(data, dict) or data.get("kind") != "locum-plan":
            raise PlanError(f'{where} is not a Locum plan: expected a JSON object with "kind": "locum-plan"')
        if data.get("format_version") != FORMAT_VERSION:
            raise PlanError(
                f"{where} has format version {data.get('format_version')!r}; this Locum reads version {FORMAT_VERSION}"
            )
        given = dict(_checked(data, PLAN_ENTRIES, 5, where))
        del given["kind"], given["format_version"]
        return cls(**given | {"layers": tuple(_layer_from_json(layer, where) for layer in data["layers"])})


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{where}: entry {name!r} is there twice in {pairs!r:.120}; keep one of the two")
    return data


def _checked(data: Any, entries: dict[str, type], required: int, where: str) -> dict[str, Any]:
    """`data`, an object that has the first `required` of these entries, maybe the others, each of its type."""
    if not isinstance(data, dict):
        raise PlanError(f"{where} is {data!r:.60}; it must be {KINDS[dict]}")
    for name in list(entries)[:required]:
        if name not in data:
            raise PlanError(f"{where} lacks the entry {name!r} ({KINDS[entries[name]]})")
    for name, value in data.items():
        if name not in entries:
            raise PlanError(f"{where}: {unknown('entry', name, entries)}")
        if type(value) is not entries[name]:
            raise PlanError(f"{where}: {name!r} is {value!r:.60}; it must be {KINDS[entries[name]]}")
    return data


def _layer_to_json(plan: LayerPlan) -> dict[str, Any]:
    bases = [{"experts": list(b.experts), "weights": list(b.weights), "align": b.align} for b in plan.bases]
    experts = []
    for e, slot in enumerate(plan.slots):
        entry: dict[str, Any] = {"expert": e, "becomes": slot.becomes}
        if slot.base is not None:
            entry["base"] = slot.base
        if slot.rank:
            entry |= {"rank": slot.rank, "start": slot.start}
        if slot.constant:
            entry["constant"] = True
        experts.append(entry)
    routing = {} if plan.routing is None else {"routing": asdict(plan.routing)}
    return {"layer": plan.layer, **routing, "bases": bases, "experts": experts}


def _layer_from_json(data: Any, where: str) -> LayerPlan:
    name = _checked(data, LAYER_ENTRIES, 2, f"{where}, a layer")["layer"]
    where = f"{where}, layer {name}"
    slots: dict[int, Slot] = {}
    for line, entry in enumerate(data["experts"]):
        given = dict(_checked(entry, {"expert": int} | SLOT_ENTRIES, 2, f"{where}, line {line} of the experts"))
        expert = given.pop("expert")
        if expert < 0:
            raise PlanError(f"{where}, expert {expert}: experts are numbered from 0")
        if expert in slots:
            raise PlanError(f"{where}, expert {expert} is listed twice; keep one of the two lines")
        slots[expert] = Slot(**given)
    for e in range(len(slots)):
        if e not in slots:
            raise PlanError(f"{where}: expert {e} is missing; every expert needs a line")
    bases = []
    for b, entry in enumerate(data.get("bases", ())):
        given = _checked(entry, BASE_ENTRIES, 2, f"{where}, base {b}")
        bases.append(Base(**given | {key: tuple(given[key]) for key in ("experts", "weights")}))
    routing = None
    if "routing" in data:
        routing = Routing(**_checked(data["routing"], ROUTING_ENTRIES, 1, f"{where}, routing"))
    return LayerPlan(name, tuple(slots[e] for e in range(len(slots))), tuple(bases), routing)


def _validate_layer(plan: LayerPlan, shape: LayerShape) -> None:
    where = f"plan for layer {plan.layer}"
    if len(plan.slots) != shape.num_experts:
        raise PlanError(
            f"{where} lists {len(plan.slots)} experts, the model has {shape.num_experts} (0 to {shape.num_experts - 1})"
        )
    for e, slot in enumerate(plan.slots):
        _validate_slot(f"{where}, expert {e}", slot, plan, shape)
    for b, base in enumerate(plan.bases):
        _validate_base(f"{where}, base {b}", base, b, plan)
    if plan.routing is not None:
        _validate_routing(f"{where}, routing", plan.routing, shape)
    dropped = [e for e, slot in enumerate(plan.slots) if not slot.survives]
    if dropped and shape.refuse_dropping:
        raise PlanError(
            f"{where} drops expert {dropped[0]}, which this model does not allow: {shape.refuse_dropping}. Make it a "
            f"stand_in or 'nothing' instead: both leave the router as it is"
        )
    if len(plan.survivors) < shape.top_k:
        raise PlanError(
            f"{where} leaves {len(plan.survivors)} experts, but the router selects top_k={shape.top_k} for every token; "
            f"keep at least {shape.top_k}"
        )
    if shape.num_groups > 1:
        size = shape.num_experts // shape.num_groups
        counts = [sum(e // size == g for e in plan.survivors) for g in range(shape.num_groups)]
        if len(set(counts)) > 1:
            raise PlanError(
                f"{where} leaves {counts} experts in the router's {shape.num_groups} groups; a group-limited router "
                f"needs equally many in each"
            )
        if counts[0] < shape.min_per_group:
            raise PlanError(
                f"{where} leaves {counts[0]} experts in each of the router's {shape.num_groups} groups; keep at least "
                f"{shape.min_per_group}, or the router cannot rank its groups and select top_k={shape.top_k} experts"
            )


def _validate_slot(where: str, slot: Slot, plan: LayerPlan, shape: LayerShape) -> None:
    if slot.becomes not in BECOMES:
        raise PlanError(f"{where}: {unknown('fate', slot.becomes, BECOMES)}")
    if slot.start not in STARTS:
        raise PlanError(f"{where}: {unknown('start', slot.start, STARTS)}")
    if slot.becomes == "stand_in" and not slot.parts:
        raise PlanError(f"{where} is a stand_in of nothing; give it a base, a rank or a constant, or make it 'nothing'")
    if slot.becomes != "stand_in" and slot.parts:
        raise PlanError(f"{where} is {slot.becomes!r} but has {slot.parts}; only a stand_in has such parts")
    if slot.start != STARTS[0] and not slot.rank:
        raise PlanError(f"{where} has start {slot.start!r} but no rank, so no adapter to start; give it a rank")
    if slot.base is not None and not (_whole(slot.base) and 0 <= slot.base < len(plan.bases)):
        raise PlanError(f"{where} uses base {slot.base!r}; the layer has {len(plan.bases)} bases, numbered from 0")
    limit = min(shape.hidden_size, shape.expert_width)
    if not _whole(slot.rank) or not 0 <= slot.rank <= limit:
        raise PlanError(
            f"{where} has rank {slot.rank!r}; allowed: 0 to {limit}, the smaller side of its {shape.hidden_size} x "
            f"{shape.expert_width} weights"
        )


def _validate_base(where: str, base: Base, index: int, plan: LayerPlan) -> None:
    if not base.experts or len(base.experts) != len(base.weights):
        raise PlanError(
            f"{where} has {len(base.experts)} experts and {len(base.weights)} weights; give one weight for each expert, "
            f"and at least one"
        )
    for e in base.experts:
        if not _whole(e) or not 0 <= e < len(plan.slots):
            raise PlanError(f"{where} averages unknown expert {e!r}; allowed: 0 to {len(plan.slots) - 1}")
    if len(set(base.experts)) < len(base.experts):
        raise PlanError(f"{where} names an expert twice: {list(base.experts)}")
    numbers = all(type(w) in (int, float) and 0 <= w <= 1 for w in base.weights)
    if not numbers or abs(sum(base.weights) - 1) > 1e-6:
        raise PlanError(f"{where} has weights {list(base.weights)}; they must be at least 0 and sum to 1")
    if not any(slot.base == index for slot in plan.slots):
        raise PlanError(f"{where} is used by no expert; remove it or give it a member")


def _validate_routing(where: str, routing: Routing, shape: LayerShape) -> None:
    if not _whole(routing.main) or not 1 <= routing.main <= shape.top_k:
        raise PlanError(
            f"{where} has main {routing.main!r}; allowed: 1 to {shape.top_k}, the experts that the router selects (top_k)"
        )
    if routing.vectors not in VECTORS:
        raise PlanError(f"{where}: {unknown('kind of vectors', str(routing.vectors), VECTORS)}")
    if type(routing.renormalise) is not bool:
        raise PlanError(f"{where} has renormalise {routing.renormalise!r}; it must be true or false")


def _whole(value: Any) -> bool:
    return type(value) is int


def make_plan(shape: ModelShape, layers: Iterable[LayerPlan], **made: Any) -> Plan:
    """A validated plan for a model of this shape. `made` are Plan's method, options and provenance."""
    return Plan(shape.model_type, shape.fingerprint, tuple(layers), **made).validate(shape)


def diff(a: Plan, b: Plan) -> list[str]:
    """What differs, one line per expert or base: "layer expert 3: kept -> dropped". Empty when they do the same."""
    lines = []
    for name in dict.fromkeys(layer.layer for layer in (*a.layers, *b.layers)):
        one, two = a.layer(name), b.layer(name)
        if one is None or two is None:
            lines.append(f"{name}: only in the {'second' if one is None else 'first'} plan")
            continue
        for what, *sides in (("expert", one.slots, two.slots), ("base", one.bases, two.bases)):
            pairs = enumerate(itertools.zip_longest(*sides, fillvalue="none"))
            lines += [f"{name} {what} {i}: {x} -> {y}" for i, (x, y) in pairs if x != y]
        if one.routing != two.routing:
            lines.append(f"{name} routing: {one.routing or 'all'} -> {two.routing or 'all'}")
    return lines


def with_provenance(plan: Plan, **provenance: Any) -> Plan:
    return replace(plan, provenance={**plan.provenance, **provenance})


def with_routing(plan: Plan, routing: Mapping[str, Routing], shape: ModelShape) -> Plan:
    """The plan with these layers' routing policies in place of what it had; layers that it left out come in whole.

    Raises PlanError where the result does not fit `shape`.
    """
    kept = {s.name: LayerPlan(s.name, (KEPT,) * s.num_experts) for s in shape.layers if s.name in routing}
    layers = kept | {layer.layer: layer for layer in plan.layers}
    made = [replace(layer, routing=routing.get(name, layer.routing)) for name, layer in layers.items()]
    return replace(plan, layers=tuple(made)).validate(shape)
