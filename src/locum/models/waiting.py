"""Hidden states of jobs that wait at a decoder layer, in a file and not in memory (layer_major.py).

What a layer is called with is a hidden state where its last side is the model's width, or several of it side by side, as some
families have them. Its storage gives its memory back and gets it again, so whatever else looks at it, such as the model's own code that goes on from there, finds the same tensor. Storages of the
model itself, such as buffers that all jobs share, stay in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..stats.on_disk import Scratch


class WaitingStates:
    """Room for the hidden states of all jobs of a run, in a file of this folder without a name. It goes with this."""

    def __init__(self, folder: Path, model: nn.Module, width: int) -> None:
        self._file, self._width = Scratch(folder), width
        self._own = {_place(tensor) for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta}
        self._rooms: dict[int, list[tuple[int, int]]] = {}  # by job: where its storages lie, and how many bytes each

    def put(self, job: int, value: Any) -> Away:
        """The hidden states in a nest of values, which lose their memory. What the job had put before is overwritten."""
        storages = {_place(tensor): tensor.untyped_storage() for tensor in tensors_in(value) if self._is_state(tensor)}
        sizes = [storage.nbytes() for storage in storages.values()]
        if [size for _, size in self._rooms.setdefault(job, [])] != sizes:
            self._rooms[job] = [(self._file.room(size), size) for size in sizes]
        away = Away(self._file, tuple(zip(storages.values(), self._rooms[job], strict=True)))
        for storage, (begin, size) in away.storages:
            self._file.bytes(begin, size).copy_(_bytes_of(storage))
        away.drop()
        return away

    def _is_state(self, tensor: Tensor) -> bool:
        return (
            tensor.ndim > 1
            and tensor.shape[-1] % self._width == 0
            and tensor.is_floating_point()
            and tensor.untyped_storage().resizable()
            and _place(tensor) not in self._own
        )


@dataclass(frozen=True)
class Away:
    """Storages that lie in a file."""

    file: Scratch
    storages: tuple[tuple[torch.UntypedStorage, tuple[int, int]], ...]

    def bring(self) -> None:
        for storage, (begin, size) in self.storages:
            storage.resize_(size)
            _bytes_of(storage).copy_(self.file.bytes(begin, size))

    def drop(self) -> None:
        for storage, _ in self.storages:
            storage.resize_(0)

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """While it is entered, they are in memory. What is written into them meanwhile is lost."""
        self.bring()
        try:
            yield
        finally:
            self.drop()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
