"""Several processes that do one run together, as `torchrun --nproc-per-node N -m locum ...` starts them.

Each rank takes every N-th batch, or layer, and they add up or tell what they found. Who finishes a file is the first rank. A
process of its own is the first rank of one. All ranks see the same files: they are on one machine, or share a file system.

Where one rank dies, torchrun ends the others. One that waits for it then sees the connection closed, and takes that for an
interrupt: what was saved stays, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=2)  # a rank may have the longest text; where one has died, torchrun ends the others
LOST = re.compile("gloo|NCCL|Connection (closed|reset)")  # in what torch says where a rank is gone
Item = TypeVar("Item")
Result = TypeVar("Result")
_joined = False


class OtherRankEnded(KeyboardInterrupt):
    """Another rank of the run has ended, so this one cannot go on."""


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


def on_this_machine() -> int:
    """Ranks of the run that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if count() > 1 else 1


def is_first() -> bool:
    return number() == 0


def share(items: Iterable[Item]) -> Iterator[Item]:
    """This rank's of some items that all ranks have alike."""
    return (item for index, item in enumerate(items) if index % count() == number())


def divide(items: Iterable[Item], work: Callable[[Item], Result]) -> list[Result]:
    """What `work` gives of every item, in their order, on every rank. Each rank works on its share alone."""
    return divide_lists(items, lambda mine: [work(item) for item in mine])


def divide_lists(items: Iterable[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """The same where `work` takes all of a rank's share at once, if it has one."""
    items = list(items)
    mine = work(own) if (own := list(share(items))) else []
    if count() == 1:
        return mine
    by_rank: list[Sequence[Result]] = [()] * count()
    with meeting():
        dist.all_gather_object(by_rank, mine)
    return [by_rank[index % count()][index // count()] for index in range(len(items))]


def add_up(tensor: Tensor) -> Tensor:
    """A tensor on the host, with what the other ranks have in theirs added to it. In place; every rank must ask."""
    if count() > 1:
        with meeting():
            dist.all_reduce(tensor)
    return tensor


def merge(tensor: Tensor, rule: str) -> Tensor:
    """A tensor on the host, merged with those of the other ranks: their "sum", their "max", or that of the first rank where all
    have the "same". In place; every rank must ask."""
    if rule == "sum" or count() == 1:
        return add_up(tensor)
    with meeting():
        if rule == "max":
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        else:
            dist.broadcast(tensor, src=0)
    return tensor


def told(value: Item) -> Item:
    """What the first rank has; what the others have does not matter. Every rank must ask."""
    if count() == 1:
        return value
    box = [value]
    with meeting():
        dist.broadcast_object_list(box)
    return box[0]


def wait() -> None:
    """Until every rank is here."""
    if count() > 1:
        with meeting():
            dist.barrier()


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """What ranks do together. Where one of them is gone, it ends as by an interrupt."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        said = (str(error).splitlines() or [""])[0]
        raise OtherRankEnded(
            f"another of the {count()} ranks has ended (its own message says why; here: {said:.100})"
        ) from error
