"""Whole numbers of few bits, packed into 32-bit words, as compressed-tensors has them ("pack-quantized").

A word holds as many as fit, the first in its lowest bits, each raised by half of their range. Scales, and zero points where
there are any, are those of rows or of groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .blocks import covers, largest, spread
from .compressed import groups_of
from .format import Entry, register_format

WORD = 32


@dataclass(frozen=True)
class IntPacked:
    """`weight_packed` [rows, columns * bits / 32] int32, `weight_scale` [rows, groups], `weight_shape`."""

    name: str = "int-packed"
    dtype: None = None
    bits: int = 4
    group: int | None = 32  # columns with one scale, of what is written; None: the whole row
    others: tuple[IntPacked, ...] = ()  # of a checkpoint that has several, told apart by the groups in a word
    parts: tuple[str, ...] = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")

    def declared(self, quantization: Mapping[str, Any]) -> IntPacked | None:
        said = [weights for name, weights in groups_of(quantization) if name == "pack-quantized"]
        found = dict.fromkeys((weights.get("num_bits"), weights.get("group_size")) for weights in said)
        if not found or not {bits for bits, _ in found} <= {2, 4, 8}:  # of others, some numbers lie in two words
            return None
        one, *others = (replace(self, bits=bits, group=group) for bits, group in found)
        groups = {bits * (group or 0) for bits, group in found}
        if len({bits for bits, _ in found}) > 1 and (0 in groups or len(groups) < len(found)):
            return None  # which weights have which bits, no header would tell
        return replace(one, others=tuple(others))

    def recognise(self, entries: Mapping[str, Entry]) -> IntPacked | None:
        if not {"_packed", "_scale", "_shape"} <= entries.keys() <= {*self.parts}:
            return None
        options = (self, *self.others) if self.others else ()
        told = next((one for one in options if one._has_groups(entries)), self)
        fits = covers(entries["_scale"]["shape"], told.shape(entries))
        return told if entries["_packed"]["dtype"] == "I32" and fits else None

    def _has_groups(self, entries: Mapping[str, Entry]) -> bool:
        return entries["_scale"]["shape"][-1] * (self.group or 0) == self.shape(entries)[-1]

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        *rows, words = entries["_packed"]["shape"]
        return (*rows, words * (WORD // self.bits))

    def nbytes(self, shape: Sequence[int]) -> int:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        scales = torch.bfloat16.itemsize * (columns // (self.group or columns))
        return rows * (columns * self.bits // 8 + scales) + torch.int64.itemsize * len(shape)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        numbers = self._unpack(tensors["_packed"])
        scales, zeros = tensors["_scale"].float(), tensors.get("_zero_point")
        groups = tensors.get("_g_idx")

        def over(values: Tensor) -> Tensor:
            if groups is not None and bool((groups >= 0).all()):
                return values[..., groups.long()]
            return spread(values, numbers.shape)

        if zeros is not None:  # packed along the rows
            zeros = self._unpack(zeros.transpose(-1, -2)).transpose(-1, -2)[..., : scales.shape[-2], :]
            numbers = numbers - over(zeros)
        return numbers * over(scales)

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        columns = weight.shape[-1] if weight.dim() else 0
        if weight.dim() != 2 or columns % (WORD // self.bits) or columns % (self.group or 1):
            raise OptionError(
                f"{self.name} needs rows in words of {WORD // self.bits} numbers and groups of {self.group or columns}, not a "
                f"tensor of shape {list(weight.shape)}"
            )
        half = 2 ** (self.bits - 1)
        scales = (largest(weight.float(), (1, self.group or columns)).clamp(min=1e-12) / (half - 1)).bfloat16()
        numbers = (weight.float() / spread(scales.float(), weight.shape)).round().clamp(-half, half - 1) + half
        places = torch.arange(0, WORD, self.bits)
        words = (numbers.long().unflatten(-1, (-1, WORD // self.bits)) << places).sum(-1)
        words = torch.where(words >= 2**31, words - 2**32, words).int()
        return {"_packed": words, "_scale": scales, "_shape": torch.tensor(weight.shape)}

    def _unpack(self, words: Tensor) -> Tensor:
        places = torch.arange(0, WORD, self.bits, dtype=torch.int32, device=words.device)
        numbers = words[..., None] >> places & (2**self.bits - 1)
        return (numbers.flatten(-2) - 2 ** (self.bits - 1)).float()


register_format(IntPacked())
