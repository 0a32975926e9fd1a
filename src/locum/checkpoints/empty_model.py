"""The model of a config without weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError
from ..formats.format import declared_formats
from ..models.families import model_class
from .placing import LocumConfig, place_containers
from .read import first_line


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, in the dtypes it will have when loaded, containers in place."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    layers, cls = locum_layers(config), model_class(config)
    try:
        with torch.device("meta"):
            model = cls._from_config(config, dtype=dtype)
    except Exception as error:  # every family builds itself in its own way
        raise CheckpointError(
            f"transformers cannot build what config.json describes: {first_line(error)}; restore the config.json that was "
            f"written with the weights"
        ) from error
    if wide := model._get_dtype_plan(dtype):  # some tensors stay float32 whatever the rest, such as selection biases
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search("|".join(key.replace("*", ".*") for key in wide), name):
                tensor.data = tensor.data.float()
    if layers:
        place_containers(model, layers)
    return model


def locum_layers(config: PreTrainedConfig) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return {}
    data = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if data.get("quant_method") != "locum":
        declared_formats(data)
        return {}
    return LocumConfig.from_dict(data).layers


def is_compressed(config: PreTrainedConfig) -> bool:
    return bool(locum_layers(config))
