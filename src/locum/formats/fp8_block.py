"""FP8 with a scale for every block, as DeepSeek-V3 has it: `weight` times `weight_scale_inv`, block by block.

Where config.json names no block size, one scale is for the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .blocks import largest, spread
from .format import Entry, register_format

METHODS = ("fp8", "mxfp8")  # as quantization_config calls it; the second has exponents for scales, in bytes
SCALES = ("F32", "BF16", "F16", "U8")


@dataclass(frozen=True)
class Fp8Block:
    """Numbers of eight bits, and a scale for each block of a matrix. Several matrices may be stacked."""

    name: str = "fp8-block"
    dtype: None = None
    block: tuple[int, int] | None = (128, 128)  # None: the whole matrix
    parts: tuple[str, ...] = ("_scale_inv", "", ".activation_scale")

    def declared(self, quantization: Mapping[str, Any]) -> Fp8Block | None:
        if quantization.get("quant_method") not in METHODS:
            return None
        block = quantization.get("weight_block_size")
        return replace(self, block=None if block is None else tuple(block))

    def recognise(self, entries: Mapping[str, Entry]) -> Fp8Block | None:
        numbers, scales = entries.get(""), entries.get("_scale_inv")
        if not numbers or not scales or numbers["dtype"] != "F8_E4M3" or scales["dtype"] not in SCALES:
            return None
        fits = math.prod(scales["shape"]) == 1 or (*scales["shape"],) == self._grid(numbers["shape"])
        return self if fits else None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        return tuple(entries[""]["shape"])

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) + torch.float32.itemsize * math.prod(self._grid(shape))

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        numbers, scales = tensors[""].float(), tensors["_scale_inv"]
        scales = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
        return numbers * spread(scales, numbers.shape, self.block)

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() < 2:
            raise OptionError(f"{self.name} needs a matrix, not a tensor of shape {list(weight.shape)}")
        scales = largest(weight.float(), self.block).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        numbers = weight.float() / spread(scales, weight.shape, self.block)
        return {"": numbers.to(torch.float8_e4m3fn), "_scale_inv": scales}

    def _grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.block is None:
            return (*shape[:-2], 1, 1)
        return (*shape[:-2], *(-(-size // one) for size, one in zip(shape[-2:], self.block, strict=True)))


register_format(Fp8Block())
