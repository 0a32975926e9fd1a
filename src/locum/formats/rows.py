"""A matrix in few bits as one run of bytes: the parts of its number format, one behind the other.

So a stack of such matrices is one tensor [N, bytes], whatever the format: what loads, casts, shards or copies it needs no word of
formats. A vector, such as a bias, stays as it is. Formats are those that are registered and can hold a matrix (format.py), and
whole numbers in groups by their names (int_groups.py). No format, "", is the dtype of the checkpoint.

Letters: N stacked items, O outputs (rows) and I inputs (columns) of an item, Y bytes of an item.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .format import FORMATS, Format
from .int_groups import BITS, GROUPS, IntGroups

Shape = tuple[int, ...]


class Field(NamedTuple):
    """Where a part lies in the bytes of a matrix."""

    part: str
    dtype: torch.dtype
    shape: Shape
    begin: int
    end: int


def row_format(name: str) -> Format:
    """The format of that name. Raises OptionError for one that is not known."""
    if (found := IntGroups.named(name)) is not None:
        return found
    if name in FORMATS:
        return FORMATS[name]
    others = ", ".join(each for each, item in FORMATS.items() if item.dtype is None and item.parts != ("",))
    raise OptionError(
        f"unknown format {name!r} of weights in few bits; allowed: intB-gG or intB-gG-z with B of {', '.join(map(str, BITS))} "
        f"and groups G of {', '.join(map(str, GROUPS))}, and {others}"
    )


def is_packed(format: str, shape: Shape) -> bool:
    """Whether a tensor with rows of this shape is bytes in a stack of this format."""
    return bool(format) and len(shape) == 2


def stored_shape(format: str, shape: Shape) -> Shape:
    """The shape of one row as a stack of this format has it. Raises OptionError where the format cannot hold it."""
    return (fields(format, shape)[-1].end,) if is_packed(format, shape) else shape


def pack(format: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The bytes of a matrix from its parts."""
    order = row_format(format).parts
    named = sorted(parts, key=order.index)
    return torch.cat([parts[part].contiguous().reshape(-1).view(torch.uint8) for part in named])


def unpack(format: str, packed: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The matrix of this shape that bytes stand for."""
    parts = {}
    for part, kind, size, begin, end in fields(format, shape):
        data = packed[begin:end]
        parts[part] = (data if kind.itemsize == 1 else data.clone()).view(kind).reshape(size)  # wider ones are aligned
    return row_format(format).read(parts)[:, : shape[1]].to(dtype)


def pack_stack(format: str, weight_NOI: Tensor) -> Tensor:
    """The bytes of matrices side by side [N, bytes], each in its nearest levels."""
    item = row_format(format)
    if not isinstance(item, IntGroups):
        return torch.stack([pack(format, item.write(weight_OI)) for weight_OI in weight_NOI])
    parts = item.write(weight_NOI.flatten(0, 1))  # whose rows know nothing of one another
    rows = (parts[part].contiguous().view(torch.uint8) for part in item.parts if part in parts)
    return torch.cat([row.reshape(len(weight_NOI), -1) for row in rows], dim=1)


def unpack_stack(format: str, packed_NY: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The same back [N, *shape]."""
    item = row_format(format)
    if not isinstance(item, IntGroups):
        return torch.stack([unpack(format, packed, shape, dtype) for packed in packed_NY])
    parts = {}
    for part, kind, size, begin, end in fields(format, shape):
        parts[part] = packed_NY[:, begin:end].contiguous().view(kind).reshape(-1, *size)
    return item.read(parts)[..., : shape[1]].to(dtype)


@functools.lru_cache(maxsize=512)
def fields(format: str, shape: Shape) -> tuple[Field, ...]:
    """Where the parts of a matrix lie, in the order of the format: by writing a matrix that has no numbers."""
    item, found, end = row_format(format), [], 0
    parts = item.write(torch.empty(shape, device="meta"))
    for part in sorted(parts, key=item.parts.index):
        tensor = parts[part]
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        found.append(Field(part, tensor.dtype, tuple(tensor.shape), begin, end))
    return tuple(found)
