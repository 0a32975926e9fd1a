"""The most memory that a measurement took."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch


def peak_bytes(model: Any) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
