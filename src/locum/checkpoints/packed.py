"""Weights that files hold in several tensors, packed numbers and their scales, seen as one tensor each.

All that is decided by names and shapes (places, cuts, fits, sizes) goes by the seen ones, which have the names and the shapes
of an unquantised checkpoint. What is copied are the parts, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.format import Format, declared_formats, part_name
from ..formats.plain import ENTRIES, FLOAT_ENTRIES

Header = Mapping[str, Mapping[str, Any]]
Files = Mapping[Path, Header]


@dataclass(frozen=True)
class Packed:
    """One weight: its format, the names of its parts in the files, and what a header would say of it as one tensor.

    Its bytes are those of all parts.
    """

    format: Format
    parts: Mapping[str, str]
    entry: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return FLOAT_ENTRIES[self.entry["dtype"]]

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """The weight as numbers, from a reader of the files' tensors, or of a row of each."""
        return self.format.read({part: read(name) for part, name in self.parts.items()}).to(self.dtype)


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
    return found


def seen(files: Files, packed: Mapping[str, Packed]) -> dict[Path, dict[str, Mapping[str, Any]]]:
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


class Numbers:
    """A packed weight that is read when it is asked for, as transformers asks a tensor of a safetensors file."""

    def __init__(self, packed: Packed, read: Callable[[], Tensor]) -> None:
        self._packed, self._read = packed, read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]

    def get_shape(self) -> list[int]:
        return [*self._packed.entry["shape"]]

    def get_dtype(self) -> str:
        return self._packed.entry["dtype"]
