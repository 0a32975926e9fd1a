"""`inspect`: what a checkpoint holds; `catalogue`: what is registered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..checkpoints.read import fingerprint_checkpoint, read_config
from ..checkpoints.skeleton import active_parameters_in, expert_parameters_in, is_compressed, layouts_of, read_shape
from ..criteria.criterion import CRITERIA
from ..methods import METHODS
from ..options import option_fields
from ..stats.sums import STATISTICS
from ..training.ways import WAYS


def inspect(model: Path) -> dict[str, Any]:
    """Layers, experts, routers and sizes of a checkpoint, from its config and file headers; no weight is read."""
    shape = read_shape(model)
    config = read_config(model)
    experts, active = expert_parameters_in(model, shape), active_parameters_in(model, shape)
    layouts = layouts_of(model)
    policies = {layer.name: layer.name in layouts and layouts[layer.name].routing for layer in shape.layers}
    routing = {name: str(policy) if policy else None for name, policy in policies.items()}
    return {
        "model": str(model),
        "model_type": shape.model_type,
        "compressed": is_compressed(config),
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": experts,
        "active_parameters": active,
        "active_bytes": shape.bytes - (shape.parameters - active) * shape.expert_itemsize,
        "fingerprint": fingerprint_checkpoint(model),
        "layers": [{**dataclasses.asdict(layer), "routing": routing[layer.name]} for layer in shape.layers],
        "notes": list(shape.notes),
    }


def catalogue() -> dict[str, Any]:
    """Everything that is registered: methods and ways to recover with their options, criteria, statistics."""
    methods = {
        name: {"summary": _summary(cls), "paper": cls.paper, "options": _options(cls)} for name, cls in METHODS.items()
    }
    ways = {
        name: {"summary": _summary(cls), "source": cls.source, "options": _options(cls)} for name, cls in WAYS.items()
    }
    criteria = {name: {"paper": item.paper, "needs": list(item.needs)} for name, item in CRITERIA.items()}
    return {"methods": methods, "ways": ways, "criteria": criteria, "statistics": sorted(STATISTICS)}


def _options(cls: type) -> dict[str, Any]:
    """Options of a method or way by name."""
    return {item.name: {"default": item.default, "help": item.metadata["help"]} for item in option_fields(cls)}


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
