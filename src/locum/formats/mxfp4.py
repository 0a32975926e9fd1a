"""MXFP4: blocks of 32 four-bit numbers along what comes in, and exponents in bytes.

gpt-oss has the experts of a layer stacked, `*_blocks` and `*_scales`, in files the transpose of what the model computes with.
compressed-tensors has matrices, `*_packed` and `*_scale` ("mxfp4-pack-quantized").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from . import fp4
from .compressed import formats_named
from .format import Entry, register_format

BLOCK, BIAS = 32, 127


@dataclass(frozen=True)
class Mxfp4:
    """Numbers of four bits in blocks of 32, each with a power of two.

    A weight is [experts, in, out], its blocks [experts, out, in / 32, 16]; or one matrix [out, in], its blocks [out, in / 32, 16].
    """

    name: str = "mxfp4"
    dtype: None = None
    parts: tuple[str, ...] = ("_blocks", "_scales")

    def declared(self, quantization: Mapping[str, Any]) -> Mxfp4 | None:
        return self if quantization.get("quant_method") == "mxfp4" else None

    def recognise(self, entries: Mapping[str, Entry]) -> Mxfp4 | None:
        if entries.keys() != {*self.parts} or any(entry["dtype"] != "U8" for entry in entries.values()):
            return None
        blocks, scales = entries["_blocks"]["shape"], entries["_scales"]["shape"]
        return self if len(blocks) == 4 and [*blocks] == [*scales, BLOCK // 2] else None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        experts, outputs, blocks = entries["_scales"]["shape"]
        return (experts, blocks * BLOCK, outputs)

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // BLOCK * (BLOCK // 2 + 1)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales = torch.exp2(tensors["_scales"].float() - BIAS)
        numbers = (fp4.unpack(tensors["_blocks"]) * scales[..., None]).flatten(-2)
        return numbers if numbers.dim() == 2 else numbers.transpose(-1, -2).contiguous()

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() not in (2, 3) or weight.shape[1] % BLOCK:
            raise OptionError(
                f"{self.name} holds matrices whose rows come in blocks of {BLOCK}, not a tensor of shape {list(weight.shape)}"
            )
        rows = weight if weight.dim() == 2 else weight.transpose(1, 2)
        blocks = rows.float().unflatten(-1, (-1, BLOCK))
        most = blocks.abs().amax(-1)
        exponents = (torch.floor(torch.log2(most)) - 2).clamp(-BIAS, BIAS)  # the largest becomes 4 to 8, and at most 6
        numbers = fp4.pack(blocks / torch.exp2(exponents)[..., None])
        return {"_blocks": numbers, "_scales": (exponents + BIAS).to(torch.uint8)}


@dataclass(frozen=True)
class Mxfp4Packed:
    """The same of one matrix [out, in]: its numbers [out, in / 2], its exponents [out, in / 32]."""

    name: str = "mxfp4-packed"
    dtype: None = None
    parts: tuple[str, ...] = ("_packed", "_scale")

    def declared(self, quantization: Mapping[str, Any]) -> Mxfp4Packed | None:
        return self if "mxfp4-pack-quantized" in formats_named(quantization) else None

    def recognise(self, entries: Mapping[str, Entry]) -> Mxfp4Packed | None:
        if entries.keys() != {*self.parts} or any(entry["dtype"] != "U8" for entry in entries.values()):
            return None
        *rows, columns = self.shape(entries)
        return self if [*entries["_scale"]["shape"]] == [*rows, columns // BLOCK] else None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        *rows, columns = entries["_packed"]["shape"]
        return (*rows, 2 * columns)

    def nbytes(self, shape: Sequence[int]) -> int:
        return Mxfp4().nbytes(shape)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        blocks = tensors["_packed"].unflatten(-1, (-1, BLOCK // 2))
        return (fp4.unpack(blocks) * torch.exp2(tensors["_scale"].float() - BIAS)[..., None]).flatten(-2)

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() != 2:
            raise OptionError(f"{self.name} holds a matrix, not a tensor of shape {list(weight.shape)}")
        parts = Mxfp4().write(weight)
        return {"_packed": parts["_blocks"].flatten(-2), "_scale": parts["_scales"]}


register_format(Mxfp4())
register_format(Mxfp4Packed())
