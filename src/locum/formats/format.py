"""What Locum needs to know of a number format, and the registry of formats.

A weight is one matrix of a model. A checkpoint keeps it in one tensor of its own name, or in several whose names begin
with it, such as packed numbers and their scales. Everywhere here such tensors are mapped from what follows the weight's
name, which is "" for the tensor of its own name.

A format is an object with the members of `Format`. Other packages offer formats under the entry-point group
"locum.formats":

    register_format(MyFormat(name="int4-g128", dtype=None, group=128))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..registry import Registry

Entry = Mapping[str, Any]  # of a safetensors header: "dtype", "shape" and "data_offsets"


class Format(Protocol):
    """How the numbers of a weight lie in a file."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which a model computes with such weights as they are. None where they have to be read first."""
        ...

    def is_declared(self, quantization: Mapping[str, Any]) -> bool:
        """Whether the `quantization_config` of a config.json says that weights are in this format."""
        ...

    def recognise(self, entries: Mapping[str, Entry]) -> Format | None:
        """This format, with the options that the tensors tell (a group size), if they are one weight in it."""
        ...

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes in the file of a weight of this shape, scales included."""
        ...

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, dequantised, from its tensors."""
        ...

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight, quantised. Raises OptionError for a weight that the format cannot hold."""
        ...


FORMATS: Registry[Format] = Registry("number format", "locum.formats")


def register_format(item: Format) -> Format:
    return FORMATS.add(item.name, item)


def format_of(entries: Mapping[str, Entry]) -> Format | None:
    """The format of one weight, from the header entries of its tensors. None where no registered format has such."""
    recognised = (item.recognise(entries) for _, item in FORMATS.items())
    return next((found for found in recognised if found is not None), None)


def check_declared(quantization: Mapping[str, Any]) -> None:
    """Refuse a quantised checkpoint whose format is not registered."""
    if not any(item.is_declared(quantization) for _, item in FORMATS.items()):
        raise UnsupportedModel(
            f"the checkpoint is quantised with {quantization.get('quant_method')!r}, which is none of the number formats "
            f"known ({', '.join(FORMATS)}); Locum compresses unquantised checkpoints: compress first, quantise afterwards"
        )
