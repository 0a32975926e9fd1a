"""The plan: what becomes of every expert of every layer. It never holds weights.

Every surviving expert of a layer computes with the sum of its parts (experts/parts/), and a `Slot` is a list of them:

    own weights                     the expert is kept
    a base, an adapter, a constant  they stand in for it
    no part at all                  its router row stays, its output is zero
    dropped                         its router row goes too: the remaining logits are normalised by the model's own rule

A layer may also have a routing policy (experts/policies/): which of the selected experts run.

    layer_plan.py  one layer;  plan.py  all of them, and the sizes that follow
    checks.py      whether a plan fits a model
    plan_json.py   its JSON, both ways;  version_1.py the format before;  plan_file.py on disk

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..experts.policies.in_turn import InTurn
from ..experts.policies.policy import Policy
from ..shapes import LayerShape, ModelShape
from .checks import check_layers
from .layer_plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot, stand_in
from .numbering import Numbering
from .plan_json import dumps, fingerprint_layers, loads

__all__ = [
    "DROPPED",
    "KEPT",
    "NOTHING",
    "Base",
    "LayerPlan",
    "Plan",
    "Size",
    "Slot",
    "diff",
    "keep_all",
    "make_plan",
    "stand_in",
    "with_provenance",
    "with_routing",
]


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
        return fingerprint_layers(self.layers)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that building reads."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.needs))

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats of parts in few bits."""
        return tuple(dict.fromkeys(part.format for layer in self.layers for part in layer.parts if part.format))

    @property
    def keeps_experts(self) -> bool:
        """Whether every expert stays as it is, so that at most the routing changes."""
        return all(layer.keeps_experts for layer in self.layers)

    def layer(self, name: str) -> LayerPlan | None:
        return next((layer for layer in self.layers if layer.layer == name), None)

    @functools.cached_property
    def staying(self) -> tuple[LayerPlan, ...]:
        """The layers whose decoder layers stay."""
        return tuple(layer for layer in self.layers if not layer.dropped)

    @functools.cached_property
    def numbering(self) -> Numbering:
        """The numbers that decoder layers have afterwards."""
        return Numbering.without(layer.layer for layer in self.layers if layer.dropped)

    def of_result(self) -> Plan:
        """The layers that stay, by the names that they have afterwards: for what works on the result. It fits no original."""
        if not self.numbering.gone:
            return self
        named = (replace(layer, layer=self.numbering.name_after(layer.layer)) for layer in self.staying)
        return replace(self, layers=tuple(named))

    def with_result(self, result: Plan) -> Plan:
        """The plan over the original whose `of_result` is this one."""
        if not self.numbering.gone:
            return result
        changed = {layer.layer: layer for layer in result.layers}
        layers = []
        for layer in self.layers:
            after = changed.get(self.numbering.name_after(layer.layer) or "")
            layers.append(layer if after is None else replace(after, layer=layer.layer))
        return self if tuple(layers) == self.layers else replace(self, layers=tuple(layers))

    def selecting(self, shape: ModelShape) -> ModelShape:
        """The shape of a model with the MoE layers that stay, whose routers select as many experts as they do afterwards."""
        top_k = {plan.layer: plan.top_k for plan in self.layers if plan.top_k is not None}
        layers = (replace(x, top_k=top_k.get(x.name, x.top_k)) for x in self._staying_of(shape))
        return replace(shape, layers=tuple(layers))

    def _staying_of(self, shape: ModelShape) -> list[LayerShape]:
        dropped = {layer.layer for layer in self.layers if layer.dropped}
        return [layer for layer in shape.layers if layer.name not in dropped]

    def is_stock(self, shape: ModelShape) -> bool:
        """Whether a stock checkpoint can hold the result: dense layers, equally many experts in each of them."""
        if not all(layer.is_dense for layer in self.layers):
            return False
        staying = self._staying_of(shape)
        counts = {layer.name: layer.num_experts for layer in staying}
        counts |= {layer.layer: len(layer.survivors) for layer in self.staying}
        can = all(x.stock_can_drop or counts[x.name] == x.num_experts for x in staying)
        return can and len(set(counts.values())) == 1

    def leaves_aside(self, shape: ModelShape) -> int:
        """How many experts leave what is beside the model: as many as the last MoE layer, where the result is stock."""
        of = self._staying_of(shape)[-1]
        last = self.layer(of.name)
        dropped = of.num_experts - len(last.survivors) if last is not None else 0
        return dropped if self.is_stock(shape) else 0

    def size(self, shape: ModelShape) -> Size:
        """Exact size of the result."""
        expert_parameters, parameters, bytes_ = shape.expert_parameters, shape.parameters, shape.bytes
        for plan in self.layers:
            layer = shape.layer(plan.layer)
            change = plan.parameters(layer) - layer.num_experts * layer.parameters()
            dropped = layer.num_experts - len(plan.survivors)
            expert_parameters += change
            parameters += change - dropped * layer.router_numel
            bytes_ += plan.bytes(layer, shape) - layer.num_experts * shape.bytes_of_expert(layer)
            bytes_ -= dropped * layer.router_bytes
            if plan.dropped:
                parameters -= layer.around_numel
                bytes_ -= layer.around_bytes
        if gone := self.leaves_aside(shape):
            parameters -= gone * shape.aside.expert_numel + shape.aside.left_numel
            bytes_ -= gone * shape.aside.expert_bytes + shape.aside.left_bytes
        return Size(parameters, bytes_, expert_parameters)

    def removed(self, shape: ModelShape) -> float:
        """The fraction of the routed experts' parameters that the plan removes."""
        return 1 - self.size(shape).expert_parameters / shape.expert_parameters

    def validate(self, shape: ModelShape) -> Plan:
        """Check everything that can be known without weights. Returns the plan; raises PlanError."""
        check_layers(self.model_type, self.shape_fingerprint, self.layers, shape)
        return self

    def dumps(self) -> str:
        """JSON with one line for every expert, so that people can read, edit and diff it."""
        return dumps({**vars(self), "layers": self.layers})

    @classmethod
    def loads(cls, text: str, where: str = "the plan") -> Plan:
        """Raises PlanError, naming `where` and the entry, for anything that is not a plan."""
        return cls(**loads(text, where))


def make_plan(shape: ModelShape, layers: Iterable[LayerPlan], **made: Any) -> Plan:
    """A validated plan for a model of this shape. `made` are Plan's method, options and provenance."""
    return Plan(shape.model_type, shape.fingerprint, tuple(layers), **made).validate(shape)


def keep_all(shape: ModelShape) -> Plan:
    """The plan that leaves every expert as it is."""
    return make_plan(shape, [LayerPlan(layer.name, (KEPT,) * layer.num_experts) for layer in shape.layers])


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
        if one.dropped != two.dropped:
            lines.append(
                f"{name} decoder layer: {' -> '.join('dropped' if x.dropped else 'stays' for x in (one, two))}"
            )
        if one.top_k != two.top_k:
            lines.append(f"{name} top-k: {one.top_k or 'as before'} -> {two.top_k or 'as before'}")
        if one.routing != two.routing:
            lines.append(f"{name} routing: {one.routing or 'all'} -> {two.routing or 'all'}")
    return lines


def with_provenance(plan: Plan, **provenance: Any) -> Plan:
    return replace(plan, provenance={**plan.provenance, **provenance})


def with_routing(plan: Plan, routing: Mapping[str, Policy], shape: ModelShape) -> Plan:
    """The plan with these layers' routing policies on top of what it had, in place of one of the same kind; layers that it
    left out come in whole.

    Raises PlanError where the result does not fit `shape`.
    """
    kept = {s.name: LayerPlan(s.name, (KEPT,) * s.num_experts) for s in shape.layers if s.name in routing}
    layers = kept | {layer.layer: layer for layer in plan.layers}
    routed = {name: InTurn.of(layer.routing, routing.get(name)) for name, layer in layers.items() if not layer.dropped}
    made = [replace(layer, routing=routed.get(name)) for name, layer in layers.items()]
    return replace(plan, layers=tuple(made)).validate(shape)
