"""Number formats as compressed-tensors names them: what is said of weights in config.json, and their parts in the files.

vLLM, SGLang and transformers read such checkpoints without Locum. A scheme is a format by which weights are read again, and what
a quantiser chooses: its levels. For whole numbers those are Locum's own groups (int_groups.py), whose codes are the same run of
bits that compressed-tensors packs into words: they change their name, not a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, unknown
from .format import FORMATS, Format
from .int_groups import GROUPS, IntGroups
from .int_packed import WORD, IntPacked
from .scaled import Scaled

INT_BITS = (4, 8)
SCHEMES = (*map(str, INT_BITS), "fp8", "mxfp4", "nvfp4")
# FP8 experts run in vLLM with inputs in FP8 alone, a scale for every token.
PER_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Scheme:
    """One number format of compressed-tensors."""

    name: str
    words: str
    format: Format  # by which Locum reads it
    levels: Format  # what a quantiser writes
    compression: str  # the format, as config.json names it
    weights: Mapping[str, Any]
    columns: int  # a row is made of whole groups of so many
    inputs: Mapping[str, Any] | None = None  # of experts, in engines that quantise those too
    by_rows: bool = True  # whether each row is written for itself

    def can_hold(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and math.prod(shape) > 0 and shape[1] % self.columns == 0

    def packed(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts in the files of a matrix of that shape, from those that `levels` wrote of it or of some of its rows.

        compressed-tensors computes whole numbers in the dtype of their scales, so it is that of the checkpoint.
        """
        if not isinstance(self.levels, IntGroups):
            return dict(parts)
        words, scales = parts["_codes"].view(torch.int32), parts["_scales"].to(dtype)
        return {"_packed": words, "_scale": scales, "_shape": torch.tensor(shape)}

    def entries(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts of a matrix of that shape, without numbers."""
        return self.packed(self.levels.write(torch.empty(*shape, device="meta")), shape, dtype)

    def group(self, targets: Iterable[str], experts: bool) -> dict[str, Any]:
        """What config.json says of the weights of some modules."""
        return {
            "targets": list(targets),
            "weights": dict(self.weights),
            "input_activations": dict(self.inputs) if experts and self.inputs else None,
            "output_activations": None,
            "format": self.compression,
        }


def scheme_of(name: str, group: int) -> Scheme:
    """The scheme of a name: 4 or 8 bits in groups of that size, or a format of floats, which have their own.

    Raises OptionError for anything else.
    """
    if group not in GROUPS:
        raise OptionError(f"--group is {group}; allowed: {', '.join(map(str, GROUPS))}")
    if name not in SCHEMES:
        raise OptionError(unknown("number format of compressed-tensors", name, SCHEMES))
    said = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    if name == "fp8":
        item = FORMATS["fp8-scaled"]
        assert isinstance(item, Scaled)
        item = replace(item, scales=torch.bfloat16)
        said |= {"num_bits": 8, "strategy": "channel"}
        return Scheme(name, "FP8 with a scale for each row", item, item, "float-quantized", said, 1, PER_TOKEN)
    if name == "mxfp4":
        said |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        item = FORMATS["mxfp4-packed"]
        return Scheme(name, "MXFP4", item, item, "mxfp4-pack-quantized", said, 32)
    if name == "nvfp4":
        scales = "torch.float8_e4m3fn"
        said |= {"strategy": "tensor_group", "group_size": 16, "scale_dtype": scales, "zp_dtype": scales}
        item = FORMATS["nvfp4"]
        return Scheme(name, "NVFP4", item, item, "nvfp4-pack-quantized", said, 16, by_rows=False)
    bits = int(name)
    said |= {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group}
    words, levels = f"{bits} bits in groups of {group} (W{bits}A16)", IntGroups(bits, group)
    return Scheme(
        name, words, IntPacked(bits=bits, group=group), levels, "pack-quantized", said, max(group, WORD // bits)
    )


def quantization_config(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose weights are in these groups; all others are numbers."""
    formats = {str(group["format"]) for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [],
        "config_groups": {f"group_{number}": dict(group) for number, group in enumerate(groups)},
    }
