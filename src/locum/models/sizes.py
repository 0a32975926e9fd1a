"""The shape of a live model, counted from its tensors."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..shapes import ModelShape
from .families import find_layers


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a live model, counted from its tensors (tied ones once), as `save_pretrained` would write them."""
    layers = find_layers(model)
    tensors = {t.data_ptr() if t.device.type != "meta" else id(t): t for t in model.state_dict(keep_vars=True).values()}
    itemsize = next(layers[0].experts.parameters()).element_size()
    total, size = (
        sum(f(t) for t in tensors.values()) for f in (torch.Tensor.numel, lambda t: t.numel() * t.element_size())
    )
    return ModelShape(model.config.model_type, tuple(x.shape for x in layers), total, size, itemsize)
