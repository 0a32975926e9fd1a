"""Tensors of safetensors files, read a piece at a time: no file is mapped, so what was read does not stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.plain import STORED
from .read import data_start

PIECE = 2**23  # bytes that are in memory at a time while a tensor is copied
Ranges = Sequence[tuple[int, int]]  # of a tensor's bytes: begin and end, in the order in which they are taken


class ShardReader:
    """The tensors of some files by name. `files` are their headers (read.py)."""

    def __init__(self, files: Mapping[Path, Mapping[str, Mapping[str, Any]]]) -> None:
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file, header in files.items():
            start = data_start(file)
            for name, entry in header.items():
                self.entries[name] = entry
                self._places[name] = file, start + entry["data_offsets"][0]

    def nbytes(self, name: str) -> int:
        begin, end = self.entries[name]["data_offsets"]
        return end - begin

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
        return self._read(name, 0, self.entries[name]["shape"])

    def row(self, name: str, index: int) -> Tensor:
        """One item of a tensor's first axis."""
        return self._read(name, index, self.entries[name]["shape"][1:])

    def _read(self, name: str, index: int, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(shape, dtype=STORED[self.entries[name]["dtype"]])
        file, start = self._places[name]
        with file.open("rb") as stream:
            stream.seek(start + index * tensor.nbytes)
            _fill(stream, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), file)
        return tensor


def _fill(stream: Any, buffer: memoryview, file: Path) -> None:
    if stream.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{file} became shorter while it was read; fetch it again")
