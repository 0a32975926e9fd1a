"""Numbers of eight bits, one by one, and scales: of the whole weight, of rows, of groups or of blocks.

As compressed-tensors ("float-quantized", "int-quantized", "naive-quantized") and ModelOpt (FP8) have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .blocks import Block, covers, spread
from .compressed import groups_of
from .format import Entry, register_format

COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scaled:
    """`weight` times `weight_scale`, a zero point subtracted before where there is one. Written with a scale for each row."""

    name: str
    stored: torch.dtype
    entry: str  # its name in safetensors headers
    dtype: None = None
    block: Block | None = None
    scales: torch.dtype = torch.float32  # of what is written
    parts: tuple[str, ...] = ("_scale", "", "_zero_point", ".input_scale", ".input_zero_point")

    def declared(self, quantization: Mapping[str, Any]) -> Scaled | None:
        algorithm = quantization.get("quant_algo") if quantization.get("quant_method") == "modelopt" else None
        if self.stored.is_floating_point and algorithm in ("FP8", "MIXED_PRECISION"):
            return self
        said = [weights for name, weights in groups_of(quantization) if name in COMPRESSED]
        said = [weights for weights in said if (weights.get("type") == "float") == self.stored.is_floating_point]
        blocks = [tuple(weights["block_structure"]) for weights in said if weights.get("block_structure")]
        return replace(self, block=blocks[0] if blocks else None) if said else None

    def recognise(self, entries: Mapping[str, Entry]) -> Scaled | None:
        if not {"", "_scale"} <= entries.keys() <= {*self.parts}:
            return None
        scales = entries["_scale"]["dtype"] in ("F32", "BF16", "F16")
        fits = covers(entries["_scale"]["shape"], self.shape(entries), self.block)
        return self if entries[""]["dtype"] == self.entry and scales and fits else None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        return tuple(entries[""]["shape"])

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) + self.scales.itemsize * math.prod(shape[:-1])

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        numbers, zeros = tensors[""].float(), tensors.get("_zero_point")
        if zeros is not None:
            numbers = numbers - spread(zeros.float(), numbers.shape, self.block)
        return numbers * spread(tensors["_scale"].float(), numbers.shape, self.block)

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() < 2:
            raise OptionError(f"{self.name} needs a matrix, not a tensor of shape {list(weight.shape)}")
        whole = not self.stored.is_floating_point
        most = torch.iinfo(self.stored).max if whole else torch.finfo(self.stored).max
        scales = (weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / most).to(self.scales)
        numbers = (weight.float() / scales.float()).clamp(-most, most)
        return {"": (numbers.round() if whole else numbers).to(self.stored), "_scale": scales}


register_format(Scaled("fp8-scaled", torch.float8_e4m3fn, "F8_E4M3"))
register_format(Scaled("int8-scaled", torch.int8, "I8"))
