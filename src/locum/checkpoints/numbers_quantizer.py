"""Packed weights as numbers, where transformers itself loads them: beside containers, in a checkpoint that is quantised.

transformers lets a quantizer name the tensors that files have of a weight, and an operation that makes the weight of them
before anything else is done with it. Here the operation is the number format's own reading (formats/), for all formats: what is
loaded is what `locum.load_model` loads, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from ..errors import CheckpointError, UnsupportedModel
from ..formats.format import Format, declared_formats, part_name
from ..formats.plain import ENTRIES

WEIGHTS = ("weight", "gate_up_proj", "down_proj")  # the last piece of the names of weights that are ever packed


def is_possible() -> bool:
    """Whether this transformers asks quantizers such things: since 5.23."""
    return hasattr(HfQuantizer, "serialized_names")


class NumbersQuantizer(HfQuantizer):
    """Reads every packed weight into the unquantised model."""

    def __init__(self, rest: dict[str, Any]) -> None:
        super().__init__(SimpleNamespace(quant_method=rest["quant_method"], dequantize=True), pre_quantized=True)
        self.formats = declared_formats(rest)
        parts = dict.fromkeys(part for one in self.formats for part in one.parts)
        # The name of the weight itself comes first, in whatever order a format has it.
        names = {weight: [weight, *(part_name(f".{weight}", part)[1:] for part in parts if part)] for weight in WEIGHTS}
        self.serialized_names = names
        self.expected: frozenset[str] | None = None  # packed weights that the model has; None: nobody looked
        self.read = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> NumbersQuantizer:
        return self  # transformers copies the operation for every layer; what is read is counted here

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": ReadNumbers}

    def check_read(self) -> None:
        """Refuse a model of which transformers handed over packed weights as they are: to it they are numbers too."""
        if self.expected is not None and self.read != len(self.expected):
            raise UnsupportedModel(
                f"transformers reads {self.read} of the {len(self.expected)} packed weights of this model (such as "
                f"{min(self.expected)}) by their number format; open it by locum.load_model"
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class ReadNumbers(ConversionOps):
    """The weights among some tensors, as numbers; all else as it is."""

    supports_many_to_many = True  # what was one weight may become several

    def __init__(self, hf_quantizer: NumbersQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        made: dict[str, Any] = {}
        for weight, parts in self._weights(input_dict).items():
            lists = {part: given if isinstance(given, list) else [given] for part, given in parts.items()}
            numbers = [
                self._read(dict(zip(lists, one, strict=True))).to(dtype) for one in zip(*lists.values(), strict=True)
            ]
            made[weight] = numbers
        if made.keys() <= {*WEIGHTS}:  # of one weight, which no other operation waits for
            return {full_layer_name: next(iter(made.values()))[0]}
        return made

    def _weights(self, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The parts of each weight, by the pattern that fits its name."""
        names = self.hf_quantizer.serialized_names
        found: dict[str, dict[str, Any]] = {}
        for pattern, tensors in given.items():
            above, _, leaf = pattern.rstrip("$").rpartition(".")
            weight = next(w for w, known in names.items() if leaf in known)
            whole = f"{above}.{weight}" if above else weight
            found.setdefault(whole, {})[leaf.removeprefix(weight) if leaf.startswith(weight) else f".{leaf}"] = tensors
        return found

    def _read(self, parts: dict[str, Tensor]) -> Tensor:
        entries = {part: {"dtype": ENTRIES[tensor.dtype], "shape": [*tensor.shape]} for part, tensor in parts.items()}
        of = next((one for item in self.hf_quantizer.formats if (one := _recognised(item, entries))), None)
        if of is not None:
            self.hf_quantizer.read += 1
            return of.read({part: tensor for part, tensor in parts.items() if part in of.parts})
        if parts.keys() != {""}:
            raise CheckpointError(f"tensors of a weight ({', '.join(parts)}) are in no number format that is known")
        return parts[""]

    @property
    def reverse_op(self) -> ConversionOps:
        return Unchanged()


class Unchanged(ConversionOps):
    """Numbers are written as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


def _recognised(item: Format, entries: dict[str, Any]) -> Format | None:
    return item.recognise({part: entry for part, entry in entries.items() if part in item.parts})


def is_on_accelerator(device_map: Any) -> bool:
    """Whether a device map of transformers puts anything elsewhere than on the CPU or the disk."""
    devices: Sequence[Any] = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    return any(device is not None and str(device) not in ("cpu", "disk", "meta") for device in devices)
