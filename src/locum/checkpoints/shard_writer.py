"""Safetensors files laid out before a tensor is there, and filled a piece at a time.

What is written is known exactly beforehand: names, dtypes, shapes. So every header can be written first, and each tensor's
bytes go to their place as they come. Tensors go to the files in the order in which they are named, and within a file they
lie as the safetensors library lays them out: the widest numbers first, so that all are aligned, then by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats.plain import ENTRY_BYTES
from .weight_files import INDEX, WEIGHTS

ALIGNED = 8  # bytes: a header's length is a multiple of it


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Entry:
        begin, end = entry["data_offsets"]
        return cls(entry["dtype"], tuple(entry["shape"]), end - begin)


class ShardWriter:
    """The weight files of a new folder: one, or several of at most `limit` bytes of tensors and an index.

    A tensor that is larger than the limit has a file of its own. A folder that `is_begun` was laid out by a writer of the same
    entries and limit. Tensors that are `written` come from another one.
    """

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        limit: int,
        written: Collection[str] = frozenset(),
        is_begun: bool = False,
    ) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        self._left = {name: 0 if name in written else entry.nbytes for name, entry in entries.items()}
        self._is_begun = is_begun
        shards = _shared_out(entries, limit)
        for number, shard in enumerate(shards):
            name = WEIGHTS if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            self._lay_out(folder / name, shard)
        if len(shards) > 1:
            sizes = {"total_size": sum(entry.nbytes for entry in entries.values())}
            index = {"metadata": sizes, "weight_map": {name: file.name for name, (file, _) in self._places.items()}}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _lay_out(self, file: Path, shard: Mapping[str, Entry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name in sorted(shard, key=lambda name: (-ENTRY_BYTES.get(shard[name].dtype, 1), name)):
            entry, places[name] = shard[name], end
            end += entry.nbytes
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [places[name], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % ALIGNED)
        head = struct.pack("<Q", len(text)) + text
        if self._is_begun:
            _check_laid_out(file, head, len(head) + end)
        else:
            with file.open("wb") as stream:
                stream.write(head)
                stream.truncate(len(head) + end)
        self._places |= {name: (file, 8 + len(text) + begin) for name, begin in places.items()}

    def write(self, name: str, pieces: Iterable[Any], begin: int = 0) -> None:
        """Put bytes at a place in a tensor, one piece behind the other."""
        file, start = self._places[name]
        with file.open("r+b", buffering=0) as stream:
            stream.seek(start + begin)
            for piece in pieces:
                done = 0
                while done < len(piece):
                    done += stream.write(piece[done:])
                self._left[name] -= len(piece)

    def finish(self) -> None:
        """What nobody wrote would be zeros. That is a fault of the caller's."""
        if wrong := sorted(name for name, left in self._left.items() if left):
            raise AssertionError(f"{len(wrong)} tensors were not written once and whole (first: {wrong[0]})")


def _check_laid_out(file: Path, head: bytes, size: int) -> None:
    """A file that was begun must be what its writer made of it."""
    if file.is_file() and file.stat().st_size == size:
        with file.open("rb") as stream:
            if stream.read(len(head)) == head:
                return
    raise CheckpointError(
        f"{file}, which an interrupted run had begun, was changed since; run it again, from the start"
    )


def _shared_out(entries: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards
