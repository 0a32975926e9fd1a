"""Scales that hold for blocks of a matrix: made from it, and spread over it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

Block = tuple[int | None, int | None]  # rows and columns; None where the scales themselves tell


def covers(scales: Sequence[int], shape: Sequence[int], block: Block | None = None) -> bool:
    """Whether scales of a shape are those of a matrix, or of several that are stacked. One number is for the whole."""
    if math.prod(scales) == 1:
        return True
    if len(scales) == 1:
        return scales[0] == shape[0]
    if len(scales) != len(shape) or [*scales[:-2]] != [*shape[:-2]]:
        return False
    for count, size, one in zip(scales[-2:], shape[-2:], block or (None, None), strict=True):
        if count not in (1, size) and -(-size // (one or -(-size // count))) != count:
            return False
    return True


def spread(scales: Tensor, shape: Sequence[int], block: Block | None = None) -> Tensor:
    """Scales that cover a matrix as large as that, or so that they broadcast to it. The last blocks may be cut short.

    Without a block size, a matrix is cut into as many equal blocks as there are scales.
    """
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 1:
        scales = scales.reshape(-1, *[1] * (len(shape) - 1))  # of rows, or of stacked matrices
    for axis, one in zip((-2, -1), block or (None, None), strict=True):
        count, size = scales.shape[axis], shape[axis]
        if count not in (1, size):
            scales = scales.repeat_interleave(one or -(-size // count), axis).narrow(axis, 0, size)
    return scales


def largest(weight: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The largest magnitude of every block. None: of the whole matrix."""
    rows, columns = block or weight.shape[-2:]
    padded = functional.pad(weight.abs(), (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
