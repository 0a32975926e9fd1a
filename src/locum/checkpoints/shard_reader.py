"""Tensors of safetensors files, read a piece at a time: no file is mapped, so what was read does not stay in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.plain import STORED
from .packed import Seen
from .read import data_start

PIECE = 2**23  # bytes that are in memory at a time while a tensor is copied
Ranges = Sequence[tuple[int, int]]  # of a tensor's bytes: begin and end, in the order in which they are taken


class ShardReader:
    """The tensors of some files by name. `files` are their headers (read.py); `packed` weights are read as numbers."""

    def __init__(
        self, files: Mapping[Path, Mapping[str, Mapping[str, Any]]], packed: Mapping[str, Seen] | None = None
    ) -> None:
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._packed = packed or {}
        self._places: dict[str, tuple[Path, int]] = {}
        self.read_bytes = 0  # so far
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

    def parts(self, name: str) -> Collection[str]:
        """The names of the tensors in the files that are read for it."""
        return self._packed[name].parts.values() if name in self._packed else [name]

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
                    self._fill(stream, piece, file)
                    yield piece
                    begin += len(piece)

    def tensor(self, name: str) -> Tensor:
        if name not in self._packed:
            return self.whole(name)
        if len(shape := self.shape(name)) < 3:
            return self._packed[name].read(self)
        stacked = torch.empty(shape, dtype=self.dtype(name))  # read one by one: on the way they are wider
        for index in range(shape[0]):
            stacked[index] = self.row(name, index)
        return stacked

    def row(self, name: str, index: int) -> Tensor:
        """One item of a tensor's first axis."""
        return self._packed[name].read_row(self, index) if name in self._packed else self.item(name, index)[0]

    # --- as the files have them

    def whole(self, name: str) -> Tensor:
        return self._read(name, 0, self.entries[name]["shape"])

    def item(self, name: str, index: int) -> Tensor:
        """One item of the first axis, which stays."""
        return self.rows(name, index, index + 1)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some items of the first axis."""
        each = self.nbytes(name) // max(1, self.count(name))
        return self._read(name, begin * each, [end - begin, *self.entries[name]["shape"][1:]])

    def count(self, name: str) -> int:
        """How many items the first axis has."""
        return next(iter(self.entries[name]["shape"]), 1)

    def _read(self, name: str, offset: int, shape: Sequence[int]) -> Tensor:
        """A tensor of that shape, from so many bytes on."""
        tensor = torch.empty(shape, dtype=STORED[self.entries[name]["dtype"]])
        file, start = self._places[name]
        with file.open("rb") as stream:
            stream.seek(start + offset)
            self._fill(stream, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), file)
        return tensor

    def _fill(self, stream: Any, buffer: memoryview, file: Path) -> None:
        if stream.readinto(buffer) != len(buffer):
            raise CheckpointError(f"{file} became shorter while it was read; fetch it again")
        self.read_bytes += len(buffer)
