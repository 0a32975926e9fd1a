"""Plain formats: every number is stored by itself, in the tensor that has the weight's name.

Models compute in three of them. The others are there so that tensors in them can be sized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .format import Entry, register_format


@dataclass(frozen=True)
class Plain:
    """One number after the other."""

    name: str
    stored: torch.dtype
    entry: str  # its name in safetensors headers
    dtype: torch.dtype | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return ("",)

    def declared(self, quantization: Mapping[str, Any]) -> None:
        return None  # a quantization_config says that weights are in another format

    def recognise(self, entries: Mapping[str, Entry]) -> Plain | None:
        return self if entries.keys() == {""} and entries[""]["dtype"] == self.entry else None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        return tuple(entries[""]["shape"])

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.stored.itemsize

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[""]

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        if self.dtype is None:
            raise OptionError(f"weights are not written in {self.name}; allowed: {', '.join(COMPUTE_DTYPES)}")
        return {"": weight.to(self.dtype)}


PLAIN = (
    Plain("fp32", torch.float32, "F32", torch.float32),
    Plain("bf16", torch.bfloat16, "BF16", torch.bfloat16),
    Plain("fp16", torch.float16, "F16", torch.float16),
    Plain("fp64", torch.float64, "F64"),
    Plain("fp8-e4m3", torch.float8_e4m3fn, "F8_E4M3"),
    Plain("int64", torch.int64, "I64"),
    Plain("int32", torch.int32, "I32"),
    Plain("int16", torch.int16, "I16"),
    Plain("int8", torch.int8, "I8"),
    Plain("uint8", torch.uint8, "U8"),
    Plain("bool", torch.bool, "BOOL"),
)
for plain in PLAIN:
    register_format(plain)
COMPUTE_DTYPES = {plain.name: plain.dtype for plain in PLAIN if plain.dtype is not None}
# By their names in files, those that a live model's tensors may have.
FLOAT_ENTRIES = {
    plain.entry: plain.stored for plain in PLAIN if plain.stored.is_floating_point and plain.stored.itemsize > 1
}
ENTRIES = {plain.stored: plain.entry for plain in PLAIN}
STORED = {plain.entry: plain.stored for plain in PLAIN}
ENTRY_BYTES = {plain.entry: plain.stored.itemsize for plain in PLAIN}
