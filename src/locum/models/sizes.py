"""The shape of a live model, counted from its tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..containers.container import StandInExperts
from ..shapes import LayerShape, ModelShape
from .decoder_layers import around_experts
from .families import MoeLayer, find_layers
from .stored import stored_dtype


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a live model, counted from its tensors (tied ones once), as `write_model` would write them."""
    layers = find_layers(model)
    tensors = {
        t.data_ptr() if t.device.type != "meta" else id(t): (t.numel(), stored_dtype(model, name, t).itemsize)
        for name, t in model.state_dict(keep_vars=True).items()
    }
    total, size = sum(numel for numel, _ in tensors.values()), sum(math.prod(x) for x in tensors.values())
    total += sum(packed_away(layer.experts) for layer in layers)
    itemsize = expert_itemsize(model, layers[0])
    shapes = stored_shapes(model, layers)
    return ModelShape(model.config.model_type, shapes, total, size, itemsize, vocab_size=vocab_size(model))


def vocab_size(model: PreTrainedModel) -> int:
    """How many tokens have an embedding."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return 0 if weight is None else weight.shape[0]


def packed_away(experts: nn.Module) -> int:
    """How many more numbers a layer's experts stand for than their tensors have: bytes hold several, and scales too."""
    if not isinstance(experts, StandInExperts) or not experts.layout.formats:
        return 0
    return experts.layout.parameters() - sum(map(math.prod, experts.layout.tensor_shapes().values()))


def expert_itemsize(model: PreTrainedModel, layer: MoeLayer) -> int:
    """Bytes of one expert parameter in the files, where it is a number."""
    floats = ((name, tensor) for name, tensor in layer.experts.named_parameters() if tensor.is_floating_point())
    name, parameter = next(floats, ("", torch.empty(0, dtype=model.dtype)))
    return stored_dtype(model, f"{layer.shape.name}.{name}", parameter).itemsize


def stored_shapes(model: PreTrainedModel, layers: tuple[MoeLayer, ...]) -> tuple[LayerShape, ...]:
    """The shapes of layers, with routers and what is around the experts as large as their files have them."""
    tensors = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in tensors.items()}
    around = around_experts(model, [layer.shape.name for layer in layers])

    def size(layer: MoeLayer) -> int:
        tensors = ((part.numel, part.tensor) for part in layer.per_expert)
        return sum(numel * stored_dtype(model, names[id(tensor)], tensor).itemsize for numel, tensor in tensors)

    def sized(layer: MoeLayer) -> LayerShape:
        shape = replace(layer.shape, router_bytes=size(layer))
        there = {id(tensors[name]): name for name in around.get(shape.name, ())}.values()
        if not there:
            return shape
        bytes_ = sum(tensors[name].numel() * stored_dtype(model, name, tensors[name]).itemsize for name in there)
        numel, of = sum(tensors[name].numel() for name in there), shape.num_experts
        return replace(
            shape, around_numel=numel - of * shape.router_numel, around_bytes=bytes_ - of * shape.router_bytes
        )

    return tuple(map(sized, layers))
