"""Whole numbers of 2, 3, 4 or 8 bits in groups of a row: codes, a scale for each group, and its minimum where it has one.

    number = (code - 2^(bits - 1)) scale          symmetric: int4-g32
    number = code scale + minimum                 with zero points, where a code of 0 is the minimum: int2-g32-z

Eight codes lie in as many bytes as they have bits, the first in the lowest; a row is filled up to whole eights. Groups run along
a row, the last may be shorter. Scales and minimums are bfloat16, which holds them for tiny and for huge weights, and codes are
chosen for the scales as they are stored.

Letters: O outputs (rows), I inputs (columns), H groups of a row, J numbers of a group, Y ranges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .format import Entry

BITS, GROUPS = (2, 3, 4, 8), (32, 64, 128)
NAME = re.compile(rf"int({'|'.join(map(str, BITS))})-g({'|'.join(map(str, GROUPS))})(-z)?")
EIGHT = 8
STEP = 0.05  # of the range of a group, by which it is clipped more and more while a scale is searched
ROOM = 2**20  # numbers that are tried at a time, over all ranges
CLIPS = {8: 1, 4: 7, 3: 9, 2: 13}  # how many ranges are tried: few bits gain from clipping, many do not


class Grid(NamedTuple):
    """The levels of groups: a scale [..., 1] for each, and a minimum or none. Numbers of bfloat16 in float32."""

    scale: Tensor
    minimum: Tensor | None


Least = Callable[[Tensor, Tensor, Grid, int], Tensor]  # `least_range`, or what is it to the bit


@dataclass(frozen=True)
class IntGroups:
    """Codes [O, I / 8 * bits] in bytes, scales [O, H] and, with zero points, minimums [O, H]."""

    bits: int = 4
    group: int = 32
    zero_points: bool = False
    dtype: None = None
    parts: ClassVar[tuple[str, ...]] = ("_codes", "_scales", "_minimums")

    @classmethod
    def named(cls, name: str) -> IntGroups | None:
        """The format of a name such as int4-g32 or int2-g64-z; None for any other."""
        found = NAME.fullmatch(name)
        return cls(int(found[1]), int(found[2]), found[3] is not None) if found else None

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group}{'-z' if self.zero_points else ''}"

    def declared(self, quantization: Mapping[str, Any]) -> None:
        return None  # Locum's own containers have it, and no checkpoint of others

    def recognise(self, entries: Mapping[str, Entry]) -> None:
        return None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        *rows, count = entries["_codes"]["shape"]
        return (*rows, count // self.bits * EIGHT)

    def nbytes(self, shape: Sequence[int]) -> int:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        of_group = torch.bfloat16.itemsize * (2 if self.zero_points else 1)
        return rows * (-(-columns // EIGHT) * self.bits + -(-columns // self.group) * of_group)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Rows of whole eights, in float32: what is past the last column is nothing."""
        codes = _unpack(tensors["_codes"], self.bits)
        groups = (tensors[part] for part in self.parts[1:] if part in tensors)
        scale, *minimum = (x.float().repeat_interleave(self.group, -1)[..., : codes.shape[-1]] for x in groups)
        return self.numbers(codes, Grid(scale, minimum[0] if minimum else None))

    def write(self, weight: Tensor, least: Least | None = None) -> dict[str, Tensor]:
        """The nearest levels, for the scale of each group with which they are nearest."""
        if weight.dim() != 2 or not weight.numel():
            raise OptionError(f"{self.name} holds a matrix, not a tensor of shape {list(weight.shape)}")
        columns = weight.shape[-1]
        missing = -columns % self.group
        x_OI, cost_I = weight.float(), torch.ones(columns, device=weight.device)
        if missing:  # such numbers widen no range and cost nothing
            x_OI = torch.cat([x_OI, x_OI[:, -1:].expand(-1, missing)], dim=1)
            cost_I = torch.cat([cost_I, cost_I.new_zeros(missing)])
        x_OHJ = x_OI.unflatten(-1, (-1, self.group))
        grid = self.grid(x_OHJ, cost_I.unflatten(-1, (-1, self.group)), least)
        return self.packed(self.codes(x_OHJ, grid).flatten(-2)[:, :columns], grid)

    # --- levels, codes and numbers of groups

    def grid(self, x: Tensor, cost: Tensor, least: Least | None = None) -> Grid:
        """The levels of each group [..., J], among some ranges the one with the least sum of cost times squared error, as `least` finds it.

        Ties go to the wider range. A few rows at a time, each in all ranges.
        """
        room = ROOM // (2 * CLIPS[self.bits] * max(1, math.prod(x.shape[1:])))
        grids = [self._grid(rows, cost, least) for rows in ([x] if x.is_meta else x.split(max(1, room)))]
        minimums = [grid.minimum for grid in grids if grid.minimum is not None]
        return Grid(torch.cat([grid.scale for grid in grids]), torch.cat(minimums) if minimums else None)

    def _grid(self, x: Tensor, cost: Tensor, least: Least | None) -> Grid:
        tried = self._ranges(x)
        best = (least or least_range)(x, cost, tried, 2 ** (self.bits - 1))[None]
        return Grid(*(None if part is None else part.gather(0, best)[0] for part in tried))

    def codes(self, x: Tensor, grid: Grid) -> Tensor:
        """The codes of the nearest levels, in float32. Halves go to the even code."""
        return _codes(x, grid, 2 ** (self.bits - 1))

    def numbers(self, codes: Tensor, grid: Grid) -> Tensor:
        return _numbers(codes, grid, 2 ** (self.bits - 1))

    def packed(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The parts of a matrix, from its codes and the levels of its groups."""
        parts = {"_codes": _pack(codes_OI, self.bits), "_scales": grid.scale[..., 0].bfloat16()}
        return parts if grid.minimum is None else parts | {"_minimums": grid.minimum[..., 0].bfloat16()}

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """The levels of all groups of rows, from those of one group each [O, 1]."""
        minimums = [grid.minimum for grid in grids if grid.minimum is not None]
        return Grid(torch.stack([grid.scale for grid in grids], 1), torch.stack(minimums, 1) if minimums else None)

    def _ranges(self, x: Tensor) -> Grid:
        """[Y, ..., 1] levels over less and less of the range of each group. Symmetric ones reach further on one side than on the other,
        so that side may be either, or neither: where the range of the codes is cut by one."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        shares = torch.tensor([1 - step * STEP for step in range(CLIPS[self.bits])], device=x.device)
        share, half = shares.view(-1, *(1,) * x.dim()), 2 ** (self.bits - 1)
        if self.zero_points:
            middle, reach = low / 2 + high / 2, (high / 2 - low / 2) * share
            minimum = _rounded(middle - reach)
            return Grid(_rounded((middle + reach - minimum) / (2 * half - 1)), minimum)
        most = torch.where(high > -low, high, low)
        either, neither = most / -half * share, most.abs() / (half - 1) * share
        return Grid(_rounded(torch.stack([either, neither], 1).flatten(0, 1)), None)


def _codes(x: Tensor, grid: Grid, half: int) -> Tensor:
    scale = torch.where(grid.scale == 0, 1.0, grid.scale)
    codes = x / scale + half if grid.minimum is None else (x - grid.minimum) / scale
    return torch.where(grid.scale == 0, float(half), codes.round().clamp(0, 2 * half - 1))


def _numbers(codes: Tensor, grid: Grid, half: int) -> Tensor:
    return (codes - half) * grid.scale if grid.minimum is None else codes * grid.scale + grid.minimum


def least_range(x: Tensor, cost: Tensor, tried: Grid, half: int) -> Tensor:
    """Of each group [..., J] which of the ranges [Y, ..., 1] loses least [..., 1], the first of equals: costs [J], or [H, J], times squared
    errors."""
    most = x.abs().amax(-1, keepdim=True)
    unit = torch.where(most > 0, most, 1.0)  # squares of huge or tiny numbers would be none
    off = (_numbers(_codes(x, tried, half), tried, half) - x) / unit
    error = _summed(off.square() * cost)
    return torch.where(error.isnan(), torch.inf, error).argmin(0)


def _summed(x: Tensor) -> Tensor:
    """Over the last axis, by halves: an order that every processor can keep."""
    x = torch.nn.functional.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        one, other = x.chunk(2, -1)
        x = one + other
    return x


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., I] as bytes, eight of them in as many bytes as they have bits."""
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % EIGHT)).unflatten(-1, (-1, EIGHT))
    places = torch.arange(EIGHT, device=codes.device)
    words = (codes << bits * places).sum(-1, keepdim=True)  # of eight bits, the eighth is where the sign is
    return (words >> 8 * places[:bits] & 0xFF).to(torch.uint8).flatten(-2)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The same back, in float32, as many as there is room for."""
    places = torch.arange(EIGHT, dtype=torch.uint8, device=packed.device)
    if EIGHT % bits == 0:  # none lies in two bytes
        return (packed[..., None] >> bits * places[: EIGHT // bits] & (2**bits - 1)).flatten(-2).float()
    places = places.int()
    words = (packed.unflatten(-1, (-1, bits)).int() << 8 * places[:bits]).sum(-1, keepdim=True)
    return (words >> bits * places & (2**bits - 1)).flatten(-2).float()
