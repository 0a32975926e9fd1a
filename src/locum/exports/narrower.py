"""Experts that were all narrowed to one width, as a stock layout with a smaller width in its config.

Where a config says the width, no family is asked: any of its numbers that is that width may be it, and is it where another value
changes the experts' shapes and nothing else. Where shared experts or dense layers share the number, there is none.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.empty_model import is_compressed, skeleton
from ..containers.container import StandInExperts
from ..errors import CheckpointError
from ..experts.parts.narrowed import Narrowed
from ..models.families import find_layers
from ..models.watch import configs_of


def one_width(model: nn.Module) -> int | None:
    """The width of a model's experts, where all of them are narrowed to it."""
    experts = [layer.experts for layer in find_layers(model)]
    if not all(isinstance(module, StandInExperts) and module.layout.routing is None for module in experts):
        return None
    found = {(stack.part, stack.variant, min(stack.rows) >= 0) for module in experts for stack in module.layout.stacks}
    ((part, variant, is_all),) = found if len(found) == 1 else ((None, (), False),)
    return variant[0] if part == Narrowed.name and is_all else None


def set_width(model: PreTrainedModel, width: int) -> bool:
    """Write the width of experts into a live model's config. Returns whether it has a place for it."""
    config = copy.deepcopy(model.config)
    if is_compressed(config):
        del config.quantization_config
    before = skeleton(config)
    layers = find_layers(before)
    holder, others = layers[0].experts.config, _shapes_of_others(before)
    place = next((i for i, one in enumerate(configs_of(before)) if one is holder), None)
    for name in [name for name, value in vars(holder).items() if value == layers[0].shape.expert_width]:
        value = getattr(holder, name)
        setattr(holder, name, width)
        if place is not None and _is_width(before.config, width, others):
            setattr(configs_of(model)[place], name, width)
            return True
        setattr(holder, name, value)
    return False


def _is_width(config: PreTrainedConfig, width: int, others: dict[str, Any]) -> bool:
    """Whether a changed config makes experts of this width, and leaves all else as it was."""
    try:
        after = skeleton(config)
    except CheckpointError:
        return False
    return {layer.shape.expert_width for layer in find_layers(after)} == {width} and _shapes_of_others(after) == others


def _shapes_of_others(model: nn.Module) -> dict[str, Any]:
    """The shapes of all tensors but those of routed experts."""
    experts = tuple(f"{layer.shape.name}." for layer in find_layers(model))
    return {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(experts)}
