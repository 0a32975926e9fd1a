"""Numbers of four bits, E2M1: sign, two bits of exponent, one of mantissa. Two in a byte, the first in its lower half."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]


def unpack(bytes_: Tensor) -> Tensor:
    """Bytes as float32 numbers, twice as many on the last axis."""
    values = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)], device=bytes_.device)
    both = torch.stack([bytes_ & 0xF, bytes_ >> 4], dim=-1)
    return values[both.int()].flatten(-2)


def pack(numbers: Tensor) -> Tensor:
    """Numbers, the nearest that there are, as bytes. Between two, the one with an even last bit; an even count on the last axis."""
    magnitudes = torch.tensor(MAGNITUDES, device=numbers.device)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    x = numbers.float().abs().contiguous()
    low, high = torch.bucketize(x, middles), torch.bucketize(x, middles, right=True)
    codes = torch.where((low != high) & (low % 2 == 1), high, low) | (numbers < 0).long() << 3
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (first | second << 4).to(torch.uint8)
