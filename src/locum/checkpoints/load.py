"""Checkpoints as live models."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..errors import CheckpointError, LocumError
from ..models.families import model_class, unread_tensors
from ..models.stored import note_stored
from . import quantizer  # noqa: F401  (importing it registers it with transformers)
from .convert import check_openable, open_containers
from .patch import load_adapted
from .read import first_line
from .skeleton import Source, check_loadable, layouts_of, open_source, skeleton
from .tensors import open_tensors
from .weight_files import is_adapter

WRONG_KEYS = {
    "missing_keys": "tensors are missing",
    "unexpected_keys": "tensors have no place in the model that config.json describes",
    "mismatched_keys": "tensors have another shape than config.json says",
}


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A checkpoint as a live model in eval mode. Every tensor must be there and have its place."""
    # What is unsupported, or does not fit, is refused before gigabytes are read.
    source = open_source(path, None if isinstance(dtype, str) else dtype)
    if is_adapter(path):
        return load_adapted(Path(path), lambda base: load_model(base, dtype, device))
    check_loadable(path, source)
    model, info = _from_pretrained(path, source, dtype)
    for what, words in WRONG_KEYS.items():
        names = {str(name) for name in info.get(what) or ()}
        if what == "unexpected_keys":
            names -= unread_tensors(model, names)
        if names:
            raise CheckpointError(f"{path}: {len(names)} {words} (first: {min(names)}); fetch it again")
    if dtype == "auto":
        note_stored(model, source.files)
    return model.to(device).eval()


def _from_pretrained(
    path: str | Path, source: Source, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers makes of a folder, or of the numbers in a quantised one. Whatever it raises on the way is one line
    about the folder."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with contextlib.ExitStack() as stack:
            if source.packed:
                options["state_dict"] = open_tensors(source, source.headers, stack)
                if (Path(path) / GENERATION_CONFIG_NAME).is_file():
                    options["generation_config"] = GenerationConfig.from_pretrained(path, local_files_only=True)
            # Mismatched sizes are not ignored: they are in what is returned, by name.
            return model_class(source.config).from_pretrained(
                None if source.packed else path,
                config=source.config,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (LocumError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it reads more than weights, such as generation_config.json
        raise CheckpointError(
            f"{path} cannot be loaded by transformers: {type(error).__name__}: {first_line(error)}"
        ) from error


def open_model(path: str | Path, device: str = "cpu", dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A stock or pruned checkpoint as a live model with stock experts. Raises as `load_model`, and UnsupportedModel."""
    check_openable(path, "give the original checkpoint")
    model = load_model(path, dtype, device)
    return open_containers(model) if layouts_of(path) else model


def set_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A live model in the dtypes that it has when it is loaded so: families keep some tensors in float32. In place."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    like = skeleton(config).state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(like[name].dtype)
    return model
