"""The most memory that was in use at once, and what is free."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import psutil
import torch

from .. import ranks
from ..checkpoints.streamed import give_back


def start_peak(device: torch.device) -> bool:
    """Let what is free go, and let the high-water mark start anew. Says whether the system can do that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform != "linux":
        return False
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed here
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The high-water mark of the process, or of its tensors on an accelerator: since its start, or since `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    unit = (
        1 if sys.platform == "darwin" else 1024
    )  # a process that was started by a large one may inherit its mark here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: str | torch.device) -> int:
    """Memory of a device in which weights could be put; a rank's share of it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks.on_this_machine()
