"""Tensors of safetensors files, read a piece at a time: no file is mapped, so what was read does not stay in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..formats.plain import STORED
from .packed import Numbers, Packed
from .read import data_start
from .skeleton import Source

PIECE = 2**23  # bytes that are in memory at a time while a tensor is copied
Ranges = Sequence[tuple[int, int]]  # of a tensor's bytes: begin and end, in the order in which they are taken


class ShardReader:
    """The tensors of some files by name. `files` are their headers (read.py); `packed` weights are read as numbers."""

    def __init__(
        self, files: Mapping[Path, Mapping[str, Mapping[str, Any]]], packed: Mapping[str, Packed] | None = None
    ) -> None:
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._packed = packed or {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file, header in files.items():
            start = data_start(file)
            for name, entry in header.items():
                self.entries[name] = entry
                self._places[name] = file, start + entry["data_offsets"][0]

    def nbytes(self, name: str) -> int:
        begin, end = self.entries[name]["data_offsets"]
        return end - begin

    def dtype(self, name: str) -> torch.dtype:
        """Of what is read."""
        return self._packed[name].dtype if name in self._packed else STORED[self.entries[name]["dtype"]]

    def shape(self, name: str) -> list[int]:
        return [*(self._packed[name].entry if name in self._packed else self.entries[name])["shape"]]

    def pieces(self, name: str, ranges: Ranges) -> Iterator[memoryview]:
        """Bytes of a tensor. What is handed out holds until the next piece."""
        (file, start), buffer = self._places[name], memoryview(bytearray(min(PIECE, self.nbytes(name))))
        with file.open("rb") as stream:
            for begin, end in ranges:
                stream.seek(start + begin)
                while begin < end:
                    piece = buffer[: min(len(buffer), end - begin)]
                    _fill(stream, piece, file)
                    yield piece
                    begin += len(piece)

    def tensor(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._read(name, 0, self.entries[name]["shape"])
        if len(shape := self.shape(name)) < 3:
            return self._packed[name].read(lambda part: self._read(part, 0, self.entries[part]["shape"]))
        stacked = torch.empty(shape, dtype=self.dtype(name))  # read one by one: on the way they are wider
        for index in range(shape[0]):
            stacked[index] = self.row(name, index)
        return stacked

    def row(self, name: str, index: int) -> Tensor:
        """One item of a tensor's first axis."""
        if name not in self._packed:
            return self._read(name, index, self.entries[name]["shape"][1:])
        count = self.shape(name)[0]

        def of_part(part: str) -> Tensor:
            shape = self.entries[part]["shape"]
            one = shape[:1] == [count]  # else a scale that all of them share
            return self._read(part, index, [1, *shape[1:]]) if one else self._read(part, 0, shape)

        return self._packed[name].read(of_part)[0]

    def _read(self, name: str, index: int, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(shape, dtype=STORED[self.entries[name]["dtype"]])
        file, start = self._places[name]
        with file.open("rb") as stream:
            stream.seek(start + index * tensor.nbytes)
            _fill(stream, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), file)
        return tensor


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


def _fill(stream: Any, buffer: memoryview, file: Path) -> None:
    if stream.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{file} became shorter while it was read; fetch it again")
