"""Tensors of a checkpoint as transformers takes them: nothing is read before it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .packed import Seen
from .shard_reader import ShardReader
from .skeleton import Source


def open_tensors(source: Source, names: Iterable[str], stack: ExitStack) -> dict[str, Any]:
    """Tensors of a checkpoint as transformers takes them, each read when it is asked for, while `stack` is open."""
    where = {name: file for file, header in source.files.items() for name in header}
    numbers, opened = ShardReader(source.stored, source.packed) if source.packed else None, {}
    tensors: dict[str, Any] = {}
    for name in names:
        if name in source.packed:
            tensors[name] = Numbers(source.packed[name], functools.partial(numbers.tensor, name))
            continue
        if where[name] not in opened:
            opened[where[name]] = stack.enter_context(safe_open(where[name], "pt"))
        tensors[name] = opened[where[name]].get_slice(name)
    return tensors


class Numbers:
    """A packed weight that is read when it is asked for, as transformers asks a tensor of a safetensors file."""

    def __init__(self, packed: Seen, read: Callable[[], Tensor]) -> None:
        self._packed, self._read = packed, read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]

    def get_shape(self) -> list[int]:
        return [*self._packed.entry["shape"]]

    def get_dtype(self) -> str:
        return self._packed.entry["dtype"]
