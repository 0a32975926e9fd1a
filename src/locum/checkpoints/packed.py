"""Weights that files hold in several tensors, packed numbers and their scales, seen as one tensor each.

All that is decided by names and shapes (places, cuts, fits, sizes) goes by the seen ones, which have the names and the shapes
of an unquantised checkpoint. What is copied are the parts, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.format import Format, declared_formats, part_name
from ..formats.plain import ENTRIES, FLOAT_ENTRIES

Header = Mapping[str, Mapping[str, Any]]
Files = Mapping[Path, Header]


class Stored(Protocol):
    """Tensors of files as they are (shard_reader.py)."""

    def whole(self, name: str) -> Tensor: ...

    def item(self, name: str, index: int) -> Tensor:
        """One item of the first axis, which stays."""
        ...

    def count(self, name: str) -> int:
        """How many there are."""
        ...


class Seen(Protocol):
    """A tensor that is seen in place of several of the files."""

    @property
    def parts(self) -> Mapping[str, str]:
        """The names of those in the files."""
        ...

    @property
    def entry(self) -> Mapping[str, Any]:
        """What a header would say of it. Its bytes are those of all parts."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, files: Stored) -> Tensor: ...

    def read_row(self, files: Stored, index: int) -> Tensor:
        """One item of its first axis."""
        ...


@dataclass(frozen=True)
class Packed:
    """One weight in a number format."""

    format: Format
    parts: Mapping[str, str]
    entry: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return FLOAT_ENTRIES[self.entry["dtype"]]

    def read(self, files: Stored) -> Tensor:
        return self.format.read({part: files.whole(name) for part, name in self.parts.items()}).to(self.dtype)

    def read_row(self, files: Stored, index: int) -> Tensor:
        count, tensors = self.entry["shape"][0], {}
        for part, name in self.parts.items():  # one scale may be for all of them
            tensors[part] = files.item(name, index) if files.count(name) == count else files.whole(name)
        return self.format.read(tensors)[0].to(self.dtype)


def find_packed(files: Files, quantization: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Packed]:
    """The packed weights of files by name. `dtype` is that in which they are computed."""
    headers = {name: entry for header in files.values() for name, entry in header.items()}
    found: dict[str, Packed] = {}
    for item in declared_formats(quantization):
        first = item.parts[0]
        for weight in (name.removesuffix(first) for name in headers if name.endswith(first)):
            parts = {part: part_name(weight, part) for part in item.parts if part_name(weight, part) in headers}
            entries = {part: headers[name] for part, name in parts.items()}
            if weight in found or (of := item.recognise(entries)) is None:
                continue
            size = sum(end - begin for begin, end in (entry["data_offsets"] for entry in entries.values()))
            said = {"dtype": ENTRIES[dtype], "shape": [*of.shape(entries)], "data_offsets": [0, size]}
            found[weight] = Packed(of, parts, said)
    read = {name for one in found.values() for name in one.parts.values()}
    for name, entry in headers.items():
        if entry["dtype"].startswith("F8") and name not in read:
            raise CheckpointError(
                f"{name} holds numbers in FP8, and nothing beside it are scales that fit them and are known (locum list "
                f"formats); fetch the files again, with the config.json that was written with them"
            )
    return found


def seen(files: Files, packed: Mapping[str, Seen]) -> dict[Path, dict[str, Mapping[str, Any]]]:
    """The headers of files with every packed weight as one tensor, in the file that has its first part."""
    weight_of = {name: weight for weight, one in packed.items() for name in one.parts.values()}
    first = {next(iter(one.parts.values())) for one in packed.values()}
    view: dict[Path, dict[str, Mapping[str, Any]]] = {}
    for file, header in files.items():
        view[file] = {}
        for name, entry in header.items():
            if name not in weight_of:
                view[file][name] = entry
            elif name in first:
                view[file][weight_of[name]] = packed[weight_of[name]].entry
    return view
