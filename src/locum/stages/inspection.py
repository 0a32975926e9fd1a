"""`inspect`: what a checkpoint holds, what compressing it would save, and the command to type next.

Letters: Z domains.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch

from ..arguments import in_declared_forms
from ..budgets.target import Target
from ..checkpoints.notes import plan_of, read_notes
from ..checkpoints.patch import check_adapter
from ..checkpoints.read import fingerprint_checkpoint
from ..checkpoints.skeleton import (
    active_bytes_in,
    active_parameters_in,
    check_loadable,
    expert_parameters_in,
    is_compressed,
    layouts_of,
    open_source,
    shape_in,
)
from ..containers.layout import experts_per_token
from ..errors import PlanError
from ..methods import METHODS
from ..plans.plan import make_plan
from ..shapes import LayerShape, ModelShape
from ..stats.origin import Origin
from ..stats.sums import STATISTICS, Statistics, axis_sizes
from .planning import decide

METHOD_OF_CHOICE, REMOVED = "lightmoe", 0.5  # what a first try would be


@in_declared_forms
def inspect(model: Path) -> dict[str, Any]:
    """Layers, experts, routers and sizes of a checkpoint, from its config and file headers; no weight is read.

    It ends with what the method of choice would save, and with the next command to type.
    """
    source = open_source(model)
    check_loadable(model, source)
    check_adapter(model, source)
    shape, config = shape_in(model, source), source.config
    experts, active = expert_parameters_in(model, shape), active_parameters_in(model, shape)
    layouts = layouts_of(model)
    policies = {name: layout.routing for name, layout in layouts.items()}
    routing = {name: str(policy) for name, policy in policies.items() if policy}
    notes = read_notes(model)
    untouched = not notes and not is_compressed(config)
    return {
        "model": str(model),
        "model_type": shape.model_type,
        "compressed": is_compressed(config),
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": experts,
        "active_parameters": active,
        "active_bytes": active_bytes_in(model, shape, source),
        "experts_per_token": experts_per_token(shape, policies),
        "fingerprint": fingerprint_checkpoint(model),
        "layers": [{**dataclasses.asdict(layer), "routing": routing.get(layer.name)} for layer in shape.layers],
        "notes": list(shape.notes),
        "would_save": would_save(shape) if untouched else None,
        "next": f"locum {_next(model, untouched, notes)}",
    }


def _next(model: Path, untouched: bool, notes: dict[str, Any]) -> str:
    """The command that follows in the order of the work. text.txt stands for the user's own text."""
    path = shlex.quote(str(model))
    if untouched:
        return f"calibrate {path} --data text.txt --out stats.safetensors"
    plan = plan_of(model)
    if plan is None or "recovery" in notes:
        return f"eval {path} --data text.txt"
    how = "" if any(layer.replaced for layer in plan.layers) else " --how lora"  # nothing was replaced: nothing anneals
    return f"recover {path} --data text.txt{how} --out recovered"


def would_save(shape: ModelShape, method: str = METHOD_OF_CHOICE, remove: float = REMOVED) -> dict[str, Any]:
    """Sizes before and after a method with its defaults, one that does not search, as if all experts mattered alike.

    A plan is made from even statistics, so its sizes are exact for a uniform selection. Real statistics move it by a few
    experts: `estimate` says whether the method reads any. `refused` says why such a plan cannot be made, or is None.
    """
    chosen = METHODS[method]()
    kinds = {_nameless(layer): layer for layer in shape.layers}  # alike layers are planned once
    few = dataclasses.replace(shape, layers=tuple(kinds.values()))
    even = even_statistics(few, chosen.needs())
    said = {"method": method, "remove": remove, "estimate": bool(chosen.needs()), "refused": None}
    try:
        planned = decide(chosen, even, few, Target(remove=remove))
    except PlanError as error:
        return said | {"refused": str(error)}
    by_kind = {kind: planned.layer(layer.name) for kind, layer in kinds.items()}
    layers = [dataclasses.replace(by_kind[_nameless(layer)], layer=layer.name) for layer in shape.layers]
    size = make_plan(shape, layers).size(shape)
    return said | {"parameters": [shape.parameters, size.parameters], "bytes": [shape.bytes, size.bytes]}


def _nameless(layer: LayerShape) -> LayerShape:
    """Equal for layers that differ in their names alone."""
    return dataclasses.replace(layer, name="", router="")


def even_statistics(shape: ModelShape, names: tuple[str, ...]) -> Statistics:
    """Statistics of a model whose experts are all alike: every sum is one, in one domain."""
    layers = {
        layer.name: {name: _ones(shape, layer, STATISTICS[name].axes) for name in names} for layer in shape.layers
    }
    return Statistics(("even",), layers, Origin(shape), tokens=1)


def _ones(shape: ModelShape, layer: LayerShape, axes: str) -> torch.Tensor:
    """[Z, ...] float64, without memory of its own."""
    return torch.ones((), dtype=torch.float64).expand(1, *axis_sizes(layer, axes, shape.vocab_size))
