"""The model of a checkpoint without its weights, and the sizes that follow from it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..containers.layout import Layout
from ..errors import CheckpointError, OptionError, UnsupportedModel
from ..formats.format import check_declared, format_of
from ..models.families import MoeLayer, find_layers, model_class, notes_on, unread_tensors
from ..models.sizes import expert_itemsize, shape_of, stored_shapes
from ..models.stored import note_stored
from ..shapes import ModelShape
from .quantizer import LocumConfig, place_containers, read_layout
from .read import base_of, file_headers, is_adapter, read_config, read_headers


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, in the dtypes it will have when loaded, containers in place."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    layers = _locum_layers(config)
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=dtype)
    if wide := model._get_dtype_plan(dtype):  # some tensors stay float32 whatever the rest, such as selection biases
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search("|".join(key.replace("*", ".*") for key in wide), name):
                tensor.data = tensor.data.float()
    if layers:
        place_containers(model, layers)
    return model


def _locum_layers(config: PreTrainedConfig) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return {}
    data = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if data.get("quant_method") != "locum":
        check_declared(data)
        return {}
    return LocumConfig(**{k: v for k, v in data.items() if k != "quant_method"}).layers


def is_compressed(config: PreTrainedConfig) -> bool:
    return bool(_locum_layers(config))


def read_shape(path: str | Path) -> ModelShape:
    """The shape of a checkpoint from its config and safetensors headers; no weight is read."""
    config = read_config(path)
    headers = read_headers(path)
    if config.dtype is None:  # transformers then takes that of the weights
        formats = (format_of({"": entry}) for entry in headers.values())
        config.dtype = next((found.dtype for found in formats if found is not None and found.dtype is not None), None)
    model, layers = layers_of(path, config)
    if is_adapter(path):  # as large as what base and adapter make together
        if ((base := base_of(Path(path))) / "config.json").is_file():
            note_stored(model, file_headers(base) | file_headers(path))
        return replace(shape_of(model), notes=notes_on(model, layers, frozenset()))
    note_stored(model, file_headers(path))
    unread = unread_tensors(model, headers)
    again = {tied for tied, source in model.all_tied_weights_keys.items() if source in headers}  # the same, twice
    headers = {name: entry for name, entry in headers.items() if name not in unread | again}
    counts = [math.prod(entry["shape"]) for entry in headers.values()]
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in headers.values()]
    of_experts = {entry["dtype"]: entry for name, entry in headers.items() if ".experts." in name}  # one of each dtype
    expert_formats = [found for entry in of_experts.values() if (found := format_of({"": entry})) is not None]
    itemsize = max((found.nbytes((1,)) for found in expert_formats), default=expert_itemsize(model, layers[0]))
    shapes, notes = stored_shapes(model, layers), notes_on(model, layers, unread)
    return ModelShape(config.model_type, shapes, sum(counts), sum(sizes), itemsize, notes)


def layers_of(path: str | Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, tuple[MoeLayer, ...]]:
    try:
        model = skeleton(config)
        return model, find_layers(model)
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error


def layouts_of(path: str | Path) -> dict[str, Layout]:
    """The layouts of a checkpoint's containers by the names of their layers."""
    return {name: read_layout(name, data) for name, data in _locum_layers(read_config(path)).items()}


def expert_parameters_in(path: str | Path, shape: ModelShape) -> int:
    """What a checkpoint stores for its routed experts; in compressed ones, what stands in for them."""
    containers, count = layouts_of(path), 0
    for layer in shape.layers:
        if layer.name in containers:
            shapes = containers[layer.name].tensor_shapes()
            count += sum(math.prod(tensor_shape) for tensor_shape in shapes.values())
        else:
            count += layer.num_experts * layer.parameters()
    return count


def active_parameters_in(path: str | Path, shape: ModelShape) -> int:
    """The most parameters of a checkpoint that one token uses (see containers/layout.py)."""
    containers, count = layouts_of(path), shape.parameters - expert_parameters_in(path, shape)
    for layer in shape.layers:
        there = containers.get(layer.name)
        count += there.active_parameters(layer.top_k) if there else layer.top_k * layer.parameters()
    return count


def check_vocabularies(model: Path, against: Path) -> None:
    ours, theirs = (read_config(p).get_text_config().vocab_size for p in (model, against))
    if ours != theirs:
        raise OptionError(
            f"{model} has a vocabulary of {ours} and {against} one of {theirs}; compare a model with the checkpoint it "
            f"was made from"
        )
