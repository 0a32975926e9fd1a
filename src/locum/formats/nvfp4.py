"""NVFP4: four-bit numbers in groups of 16 along what comes in, a scale in FP8 for every group, and one for the whole weight.

compressed-tensors divides by the scale of the whole, ModelOpt multiplies; their parts have other names.
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

GROUP = 16


@dataclass(frozen=True)
class Nvfp4:
    """Numbers of four bits, two in a byte, with scales of groups and of the whole."""

    name: str
    numbers: str  # the parts by what they hold
    scale: str
    whole: str
    input: str
    divides: bool  # by the scale of the whole
    dtype: None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.whole, self.numbers, self.scale, self.input)

    def declared(self, quantization: Mapping[str, Any]) -> Nvfp4 | None:
        if self.divides:
            return self if "nvfp4-pack-quantized" in formats_named(quantization) else None
        by_modelopt = quantization.get("quant_method") == "modelopt"
        return self if by_modelopt and quantization.get("quant_algo") in ("NVFP4", "MIXED_PRECISION") else None

    def recognise(self, entries: Mapping[str, Entry]) -> Nvfp4 | None:
        kinds = {part: entry["dtype"] for part, entry in entries.items() if part != self.input}
        if kinds != {self.numbers: "U8", self.scale: "F8_E4M3", self.whole: "F32"}:
            return None
        scales = [*entries[self.scale]["shape"]]
        return self if [*scales[:-1], scales[-1] * GROUP] == [*self.shape(entries)] else None

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        *rows, columns = entries[self.numbers]["shape"]
        return (*rows, 2 * columns)

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // 2 + math.prod(shape) // GROUP + torch.float32.itemsize

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales, whole = tensors[self.scale].float(), tensors[self.whole].float()
        whole = (
            whole.reshape(*whole.shape, *[1] * (scales.dim() - whole.dim())) if whole.numel() > 1 else whole.reshape(())
        )
        scales = scales / whole if self.divides else scales * whole
        numbers = fp4.unpack(tensors[self.numbers]).unflatten(-1, (scales.shape[-1], -1))
        return (numbers * scales[..., None]).flatten(-2)

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() < 2 or weight.shape[-1] % GROUP:
            raise OptionError(
                f"{self.name} needs rows in groups of {GROUP}, not a tensor of shape {list(weight.shape)}"
            )
        groups = weight.float().unflatten(-1, (-1, GROUP))
        most = groups.abs().amax(-1) / fp4.LARGEST
        whole = most.amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        scales = (most / whole).to(torch.float8_e4m3fn)
        numbers = fp4.pack(groups / (scales.float() * whole).clamp(min=1e-30)[..., None]).flatten(-2)
        said = (1 / whole).reshape(1) if self.divides else whole
        return {self.numbers: numbers, self.scale: scales, self.whole: said}


register_format(Nvfp4("nvfp4", "_packed", "_scale", "_global_scale", ".input_global_scale", divides=True))
register_format(Nvfp4("nvfp4-modelopt", "", "_scale", "_scale_2", ".input_scale", divides=False))
