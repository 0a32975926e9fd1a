"""Tensors that lie in a file and not in memory: of those of one layer some may be wanted, of all layers they are too large.

    Stack       a float64 tensor that is added to a row at a time, in a file without a name, which goes with it
    FromFile    float64 tensors of a safetensors file, each mapped anew whenever it is asked for
    on_disk     a tensor of any numbers in a file without a name, mapped as a whole for as long as it is held
    Scratch     bytes in a file without a name that grows, each run of them mapped anew whenever it is asked for

A mapped tensor takes memory where it is read or written, until it is let go, or `put_down` for a while.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..json_text import parse_json

ITEM = torch.float64.itemsize
_whole: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # of `on_disk`, by address


class _Opened:
    """A file that is open for as long as something holds this."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _nameless(folder: Path, size: int) -> _Opened:
    """A file of zeros that goes when it is closed."""
    with tempfile.TemporaryFile(dir=folder) as file:
        opened = _Opened(os.dup(file.fileno()))
    _grow(opened, 0, size)
    return opened


def _grow(file: _Opened, begin: int, size: int) -> None:
    """Have a file, so long until now, go on for so many bytes."""
    os.ftruncate(file.descriptor, begin + size)
    if hasattr(os, "posix_fallocate"):  # room at once: writing to a mapped file without room ends the process
        os.posix_fallocate(file.descriptor, begin, max(1, size))


class Stack:
    """Zeros at first. Raises OSError where the disk has no room."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.shape, self._file = shape, _nameless(folder, math.prod(shape) * ITEM)

    def add(self, row: int, more: Tensor) -> None:
        count = math.prod(self.shape[1:])
        mapped(self._file, row * count * ITEM, count).add_(more.reshape(-1))

    def tensor(self) -> Tensor:
        return mapped(self._file, 0, math.prod(self.shape)).reshape(self.shape)


class FromFile(Mapping[str, Tensor]):
    """By name, where `places` says at which byte each tensor begins and what shape it has. The file stays open, so that it is the
    same one even when another takes its place."""

    def __init__(self, file: _Opened, places: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        self._file, self._places = file, places

    @classmethod
    def open(cls, path: Path, chosen: Callable[[str], bool]) -> FromFile:
        """Those of a file's tensors whose names are chosen. Raises ValueError for numbers that are not float64; all else that a
        safetensors file can have wrong must have been looked at before."""
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header, opened = parse_json(file.read(size)), _Opened(os.dup(file.fileno()))
        entries = {name: entry for name, entry in header.items() if chosen(name)}
        if wrong := next((name for name, entry in entries.items() if entry["dtype"] != "F64"), None):
            raise ValueError(f"{wrong} is {entries[wrong]['dtype']}; expected F64")
        places = {name: (8 + size + entry["data_offsets"][0], tuple(entry["shape"])) for name, entry in entries.items()}
        return cls(opened, places)

    def named(self, names: Mapping[str, str]) -> FromFile:
        """Some of them, under the names that are the keys here."""
        return FromFile(self._file, {name: self._places[here] for name, here in names.items()})

    def __getitem__(self, name: str) -> Tensor:
        begin, shape = self._places[name]
        return mapped(self._file, begin, math.prod(shape), writable=False).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Scratch:
    """A file that gives room for bytes. Raises OSError where the disk has none."""

    def __init__(self, folder: Path) -> None:
        self._file, self._end = _nameless(folder, 0), 0

    def room(self, size: int) -> int:
        """Where so many bytes, of which nobody else knows, begin."""
        begin = self._end
        _grow(self._file, begin, size)
        self._end += size
        return begin

    def bytes(self, begin: int, count: int) -> Tensor:
        """uint8 [count], which are the file's own."""
        return mapped(self._file, begin, count, dtype=torch.uint8)


def mapped(file: _Opened, begin: int, count: int, writable: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """So many numbers of a file from this byte on. Where they are not writable, what is written stays in memory."""
    if not count:
        return torch.zeros(0, dtype=dtype)
    start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
    found = mmap.mmap(file.descriptor, begin + count * dtype.itemsize - start, offset=start, access=access)
    return torch.frombuffer(found, dtype=dtype, offset=begin - start, count=count)


def on_disk(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros to be written to and read, in a file of this folder without a name. Raises OSError where the disk has no room."""
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype)
    file = _nameless(folder, math.prod(shape) * dtype.itemsize)
    whole = mmap.mmap(file.descriptor, math.prod(shape) * dtype.itemsize)
    tensor = torch.frombuffer(whole, dtype=dtype).reshape(shape)
    _whole[tensor.data_ptr()] = whole
    return tensor


def is_on_disk(tensor: Tensor) -> bool:
    """Whether a tensor begins where one of `on_disk` does, and so is all of it or its first rows."""
    return tensor.data_ptr() in _whole


def put_down(tensor: Tensor) -> None:
    """Let the memory go that such a tensor takes. Its numbers come back from the file, or from the system's copy of that, when they
    are next asked for."""
    if hasattr(mmap, "MADV_DONTNEED"):
        _whole[tensor.data_ptr()].madvise(mmap.MADV_DONTNEED)  # of a file that is shared: nothing is lost
