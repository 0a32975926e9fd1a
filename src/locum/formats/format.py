"""What Locum needs to know of a number format, and the registry of formats.

A weight is one matrix of a model, or several stacked. A checkpoint keeps it in one tensor of its own name, or in several,
such as packed numbers and their scales. Those are its parts. A part is named by what follows the weight's name, "" being the
tensor of that very name; a part that begins with a dot is beside the weight, in the place of the last piece of its name.

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

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that a weight may have. The first is one that no weight in another format has: the last to be left out."""
        ...

    def declared(self, quantization: Mapping[str, Any]) -> Format | None:
        """This format, with the options that the `quantization_config` of a config.json tells (the size of blocks), if that
        says that weights are in it."""
        ...

    def recognise(self, entries: Mapping[str, Entry]) -> Format | None:
        """This format, with the options that the parts tell (a group size), if they are one weight in it."""
        ...

    def shape(self, entries: Mapping[str, Entry]) -> tuple[int, ...]:
        """The shape of the weight that `read` makes of such parts."""
        ...

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes in the file of a weight of this shape, as `write` makes it, scales included."""
        ...

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, dequantised, from its parts."""
        ...

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a weight, quantised. Raises OptionError for a weight that the format cannot hold."""
        ...


FORMATS: Registry[Format] = Registry("number format", "locum.formats")


def register_format(item: Format) -> Format:
    return FORMATS.add(item.name, item)


def part_name(weight: str, part: str) -> str:
    """The name in files of a part of a weight."""
    return weight.rpartition(".")[0] + part if part.startswith(".") else weight + part


def format_of(entries: Mapping[str, Entry]) -> Format | None:
    """The format of one weight, from the header entries of its parts. None where no registered format has such."""
    recognised = (item.recognise(entries) for _, item in FORMATS.items())
    return next((found for found in recognised if found is not None), None)


def declared_formats(quantization: Mapping[str, Any]) -> tuple[Format, ...]:
    """The formats that a `quantization_config` says some weights are in. Raises UnsupportedModel where none is registered."""
    found = tuple(one for _, item in FORMATS.items() if (one := item.declared(quantization)) is not None)
    if not found:
        said = {k: quantization[k] for k in ("quant_method", "quant_algo", "format") if quantization.get(k) is not None}
        raise UnsupportedModel(
            f"the checkpoint is quantised with {', '.join(map(repr, said.values())) or None}, which is none of the number "
            f"formats known ({', '.join(FORMATS)}); Locum compresses unquantised checkpoints: compress first, quantise "
            f"afterwards"
        )
    return found
