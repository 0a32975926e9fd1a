"""The first layers of a checkpoint as a model of their own: what is measured of it says what the whole would take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..models.layer_major import NOTE
from .streamed import LayersOfFiles, stream_model
from .weight_files import is_adapter


@dataclass(frozen=True, eq=False)
class Beginning:
    """A live model with the decoder layers up to the first one with experts, and all that is around them."""

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    of: int  # decoder layers that the checkpoint has
    layer_bytes: int  # that the last of these layers takes in memory
    layer_seconds: float  # that reading it took

    @property
    def missing_bytes(self) -> int:
        """What the other layers would take in memory, if all are like the last one here."""
        return (self.of - len(self.layers)) * self.layer_bytes


def begin_model(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Beginning:
    """The beginning of a checkpoint in eval mode, in this dtype or its own. Raises as `stream_model`."""
    if is_adapter(path):
        raise UnsupportedModel(f"{path} is an adapter, of which --dry-run measures nothing; name its base")
    model = stream_model(path, device, dtype)
    files: LayersOfFiles = getattr(model, NOTE)
    count, seconds = files.first_with_experts + 1, 0.0
    for index in range(count):
        begin = time.perf_counter()
        files.bring(index)
        seconds = time.perf_counter() - begin
    files.on_call.keep()
    stack, of = model.get_submodule(files.name), len(files.modules)
    del stack[count:]
    delattr(model, NOTE)
    size = sum(tensor.nbytes for tensor in stack[-1].parameters())
    return Beginning(model, list(stack), of, size, seconds)
