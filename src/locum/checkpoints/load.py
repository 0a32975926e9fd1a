"""Checkpoints as live models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..models.families import model_class
from ..models.stored import note_stored
from .convert import check_openable, open_containers
from .patch import load_adapted
from .read import file_headers, is_adapter, read_config
from .skeleton import layers_of, layouts_of, skeleton

WRONG_KEYS = {
    "missing_keys": "tensors are missing",
    "unexpected_keys": "tensors have no place in the model that config.json describes",
    "mismatched_keys": "tensors have another shape than config.json says",
}


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A checkpoint as a live model in eval mode. Every tensor must be there and have its place."""
    config = read_config(path)
    layers_of(path, config)  # refuse what is unsupported before reading gigabytes
    headers = file_headers(path)
    if is_adapter(path):
        return load_adapted(Path(path), lambda base: load_model(base, dtype, device))
    model, info = model_class(config).from_pretrained(
        path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )  # mismatched sizes are not ignored: they are in `info`, by name
    for what, words in WRONG_KEYS.items():
        if info.get(what):
            first = min(map(str, info[what]))
            raise CheckpointError(f"{path}: {len(info[what])} {words} (first: {first}); fetch the checkpoint again")
    if dtype == "auto":
        note_stored(model, headers)
    return model.to(device).eval()


def open_model(path: str | Path, device: str = "cpu") -> PreTrainedModel:
    """A stock or pruned checkpoint as a live model with stock experts. Raises as `load_model`, and UnsupportedModel."""
    check_openable(path, "give the original checkpoint")
    model = load_model(path, device=device)
    return open_containers(model) if layouts_of(path) else model


def set_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A live model in the dtypes that it has when it is loaded so: families keep some tensors in float32. In place."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    like = skeleton(config).state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(like[name].dtype)
    return model
