"""Scales that hold for blocks of a matrix: made from it, and spread over it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

Block = tuple[int | None, int | None]  # rows and columns; None where the scales themselves tell


def spread(scales: Tensor, shape: Sequence[int], block: Block | None = None) -> Tensor:
    """Scales as large as the matrix that they are for, or so that they broadcast to it. The last blocks may be cut short.

    One number is for the whole. Without a block size, a matrix is cut into as many equal blocks as there are scales.
    Raises ValueError for scales that do not cover the matrix.
    """
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 1:
        scales = scales.reshape(-1, *[1] * (len(shape) - 1))  # of rows, or of stacked matrices
    for axis, one in zip((-2, -1), block or (None, None), strict=True):
        count, size = scales.shape[axis], shape[axis]
        if count in (1, size):
            continue
        one = one or -(-size // count)
        if -(-size // one) != count:
            raise ValueError(f"{list(scales.shape)} scales are not those of a matrix of shape {list(shape)}")
        scales = scales.repeat_interleave(one, axis).narrow(axis, 0, size)
    return scales


def largest(weight: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The largest magnitude of every block. None: of the whole matrix."""
    rows, columns = block or weight.shape[-2:]
    padded = functional.pad(weight.abs(), (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
