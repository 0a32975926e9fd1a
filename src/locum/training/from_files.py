"""What training reads of an original that is in no memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoints.experts_of import expert_readers
from ..checkpoints.skeleton import read_shape
from ..experts.weights import ExpertWeights
from .context import Original


def original_experts(path: Path, dtype: torch.dtype) -> Original:
    """The experts of a checkpoint folder in this dtype, each read when it is asked for. Raises as `expert_readers`."""
    readers = expert_readers(path)

    def reader(name: str) -> Callable[[int], ExpertWeights]:
        return lambda e: readers(name)(e).map(lambda _, tensor: tensor.to(dtype))

    return Original({layer.name: reader(layer.name) for layer in read_shape(path).layers})
