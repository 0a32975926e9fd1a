"""Matrices in few bits, as grouped products take them: in place of a stack of numbers, and as it is stored.

A product that knows a format reads codes and scales from the bytes of a matrix (formats/rows.py) and makes numbers of them
where it multiplies. `Coding` says all that it needs: where in the bytes what lies, and what it means.

    number = value(code) scale          value of a code: code - 2^(bits - 1), or the number that its bits are
    number = code scale + minimum       with zero points

Letters: N stacked items, O outputs (rows) and I inputs (columns) of an item, Y bytes of an item.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.format import Format
from ..formats.fp8_block import Fp8Block
from ..formats.int_groups import IntGroups
from ..formats.mxfp4 import BLOCK, Mxfp4
from ..formats.nvfp4 import GROUP, Nvfp4
from ..formats.rows import fields, row_format, unpack
from ..formats.scaled import Scaled


class Matrices(NamedTuple):
    """Those of one number format and shape: a product may be right for some and wrong for others."""

    format: str
    outputs: int
    inputs: int


class Coding(NamedTuple):
    """How numbers lie in the bytes of one matrix. Places are in bytes from its beginning."""

    code: str  # int2, int3, int4, int8: of groups; s8: whole numbers with a sign; e2m1, e4m3: floats
    scale: str  # what a scale is: bf16, f32, e4m3, or e8m0, an exponent
    more: str  # beside it: "minimum" of a group in bf16; "times" or "over", one f32 for the whole; or ""
    row: int  # bytes of the codes of one row
    numbers_at: int
    scales_at: int
    more_at: int
    scale_row: int  # scales that lie between those of one row, or block of rows, and the next
    group: int  # columns that share a scale, a power of two
    block: int  # rows that do


SCALES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float8_e4m3fn: "e4m3", torch.uint8: "e8m0"}


class Parts(NamedTuple):
    """The parts of a format by what they hold, and the columns and rows of one scale."""

    code: str
    numbers: str
    scales: str
    other: str  # "" for none
    more: str
    group: int
    block: int = 1


@functools.lru_cache(maxsize=512)
def coding(format: str, outputs: int, inputs: int) -> Coding | None:
    """How a matrix of this format and shape lies in its bytes; None where no product knows it."""
    parts = _parts(row_format(format), inputs)
    if parts is None:
        return None
    at = {field.part: field for field in fields(format, (outputs, inputs))}
    numbers, scales, other = at[parts.numbers], at[parts.scales], at.get(parts.other) if parts.more else None
    size = max(field.end for field in at.values())
    wide = [field for field in (scales, other) if field is not None]
    if any(field.begin % field.dtype.itemsize or size % field.dtype.itemsize for field in wide):
        return None  # a device reads them only where they are aligned
    return Coding(
        code=parts.code,
        scale=SCALES[scales.dtype],
        more=parts.more,
        row=(numbers.end - numbers.begin) // outputs,
        numbers_at=numbers.begin,
        scales_at=scales.begin,
        more_at=0 if other is None else other.begin,
        scale_row=scales.shape[-1],
        group=parts.group,
        block=parts.block,
    )


def _parts(item: Format, inputs: int) -> Parts | None:
    whole = 1 << max(inputs - 1, 1).bit_length()  # a group that holds all columns
    match item:
        case IntGroups():
            return Parts(f"int{item.bits}", *item.parts, "minimum" if item.zero_points else "", item.group)
        case Scaled(block=None):
            return Parts("e4m3" if item.stored.is_floating_point else "s8", "", "_scale", "", "", whole)
        case Fp8Block(block=(rows, columns)) if columns & (columns - 1) == 0:
            return Parts("e4m3", "", "_scale_inv", "", "", columns, rows)
        case Mxfp4():
            return Parts("e2m1", "_blocks", "_scales", "", "", BLOCK)
        case Nvfp4():
            return Parts("e2m1", item.numbers, item.scale, item.whole, "over" if item.divides else "times", GROUP)
    return None


@dataclass(frozen=True)
class Packed:
    """A stack of matrices in few bits, or some rows of each, with the members of a tensor [N, O, I] that products use."""

    bytes_NY: Tensor
    format: str
    whole: tuple[int, int]  # the shape of a matrix
    first: int = 0  # its first row that is meant
    rows: int | None = None  # and how many; None: all from there on

    @property
    def shape(self) -> tuple[int, int, int]:
        outputs, inputs = self.whole
        return (len(self.bytes_NY), outputs - self.first if self.rows is None else self.rows, inputs)

    @property
    def device(self) -> torch.device:
        return self.bytes_NY.device

    @property
    def coding(self) -> Coding:
        found = coding(self.format, *self.whole)
        if found is None:
            raise ValueError(f"no product knows {self.format} of {self.whole}")
        return found

    def __len__(self) -> int:
        return len(self.bytes_NY)

    def __getitem__(self, key: tuple[slice, slice]) -> Packed:
        """Some rows of every matrix: packed[:, 3:7]."""
        _, (begin, end, _) = key[0], key[1].indices(self.shape[1])
        return replace(self, first=self.first + begin, rows=max(end - begin, 0))

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """What the bytes stand for [N, O, I]."""
        here = slice(self.first, self.first + self.shape[1])
        return torch.stack([unpack(self.format, one_Y, self.whole, dtype)[here] for one_Y in self.bytes_NY])
