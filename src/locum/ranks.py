"""Several processes that do one run together, as `torchrun --nproc-per-node N -m locum ...` starts them.

Each rank takes every N-th batch and they add up what they counted. What is written the first rank writes alone. A process of
its own is the first rank of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=2)  # a rank may have the longest text; where one has died, torchrun ends the others
Item = TypeVar("Item")
_joined = False


def join() -> None:
    """Meet the other ranks, where torchrun has started some. By NCCL where every rank has a GPU of its own, else by gloo."""
    global _joined
    if _started() > 1 and not _joined:
        each = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        if each:
            torch.cuda.set_device(local())
        dist.init_process_group("cuda:nccl,cpu:gloo" if each else "gloo", timeout=PATIENCE)
        _joined = True


def leave() -> None:
    global _joined
    if _joined:
        dist.destroy_process_group()
        _joined = False


def is_spare() -> bool:
    """Whether torchrun has started this process beside a first one, which can do alone what is not shared."""
    return _started() > 1 and os.environ["RANK"] != "0"


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def count() -> int:
    """Ranks that do this run; 1 where they have not met."""
    return dist.get_world_size() if _joined else 1


def number() -> int:
    return dist.get_rank() if _joined else 0


def local() -> int:
    """The rank among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    return number() == 0


def share(items: Iterable[Item]) -> Iterator[Item]:
    """This rank's of some items that all ranks have alike."""
    return (item for index, item in enumerate(items) if index % count() == number())


def add_up(tensor: Tensor) -> Tensor:
    """A tensor on the host, with what the other ranks have in theirs added to it. In place; every rank must ask."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Until every rank is here."""
    if count() > 1:
        dist.barrier()
