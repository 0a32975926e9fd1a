"""The hook by which transformers loads checkpoints with containers.

`import locum` registers a quantizer for them (placing.py says what their config.json has). Before weights load, it puts
containers where the config says, and the ordinary `AutoModelForCausalLM.from_pretrained` does the rest. Nothing executable is
ever loaded. In a quantised checkpoint, what is in no container is handed to the checkpoint's own quantizer where that computes
with packed numbers, on a GPU, and read as numbers elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..errors import CheckpointError, UnsupportedModel
from ..models.conversions import note_conversions
from ..models.stored import places_of
from .fit import check_shape, check_shapes
from .numbers_quantizer import NumbersQuantizer, is_on_accelerator, is_possible
from .own_rows import OwnRows, see
from .packed import Files, Packed, Seen
from .placing import LocumConfig, containers_of, place_containers
from .read import read_header
from .shard_reader import ShardReader

COMPUTED_WITH = ("fp8", "mxfp8", "mxfp4")  # packed numbers that transformers has products for


@register_quantizer("locum")
class LocumQuantizer(HfQuantizer):
    """Puts containers into the empty model, then steps aside: afterwards it is an ordinary, trainable model.

    `rest` is the quantizer of what is in no container. Where it leaves weights quantised, the model stays in its hands, and is
    no more saved than trained.
    """

    def __init__(self, quantization_config: LocumConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.rest: HfQuantizer | None = None  # known once it is known where the model goes
        self._names: tuple[str, ...] = ()  # of the files' tensors, seen as numbers
        self._own: dict[str, Seen] = {}
        self._files: ShardReader | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        place_containers(model, self.quantization_config.layers)
        if checkpoint_files:
            headers = {Path(file): read_header(Path(file)) for file in checkpoint_files}
            _check_files(model, self._see(model, headers))
        if self.rest is not None:
            self._hand_over(model, checkpoint_files=checkpoint_files, **kwargs)
        if hasattr(model.config, "auto_map"):  # names a file that saving the model does not write (remote_code.py)
            del model.config.auto_map

    def _see(self, model: PreTrainedModel, stored: Files) -> Files:
        """The files' headers, as if nothing in them were quantised."""
        if self.rest is None:
            return stored
        files, packed = see(stored, self.quantization_config.rest, model.config, model.dtype)
        self._files = ShardReader(stored, packed)
        if isinstance(self.rest, NumbersQuantizer):
            others = [name for name, one in packed.items() if isinstance(one, Packed)]
            self.rest.expected = frozenset(places_of(model, others))
        self._names = tuple(name for header in files.values() for name in header)
        self._own = {name: row for name, row in packed.items() if isinstance(row, OwnRows)}
        return files

    def _hand_over(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Let the other quantizer have the model, all but the containers and the modules that call them."""
        containers = dict(containers_of(model))
        blocks = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in containers}
        self.rest._process_model_before_weight_loading(model, **kwargs)
        for name, module in (*blocks.items(), *containers.items()):
            model.set_submodule(name, module)
        # transformers knows neither these tensors nor what they become: they are read after it (`_fill`).
        model._keys_to_ignore_on_load_missing = {
            *(model._keys_to_ignore_on_load_missing or ()),
            *map(re.escape, self._own),
        }
        of_containers = {rf"{re.escape(name)}\." for name in containers}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *of_containers}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._fill(model)
        if isinstance(self.rest, NumbersQuantizer):
            self.rest.check_read()
        if self.rest is not None:
            self.rest._process_model_after_weight_loading(model, **kwargs)
            if not getattr(self.rest.quantization_config, "dequantize", False):
                return model
            model.config.quantization_config = LocumConfig(self.quantization_config.layers)
            note_conversions(model, self._names)  # without those of the other quantizer, which saving would turn around
        # The config keeps the layouts, so saving works; without a quantizer, .half(), Trainer and PEFT work as usual.
        del model.hf_quantizer
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        _check_loaded(model)
        return model

    @torch.no_grad()
    def _fill(self, model: PreTrainedModel) -> None:
        """Own weights of containers' experts, as numbers."""
        for name in self._own:
            parameter = model.get_parameter(name)
            for row in range(len(parameter)):
                parameter[row] = self._files.row(name, row).to(parameter.device)
            parameter._is_hf_initialized = True

    def is_serializable(self) -> bool:
        return self.rest is None

    @property
    def is_trainable(self) -> bool:
        return self.rest is None

    # --- what the other quantizer is asked for

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_config.rest is not None:
            self.rest = _quantizer_of(self.quantization_config.rest, *args, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.rest is None else self.rest.update_dtype(dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.rest is not None and self.rest.param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return super().get_quantize_ops() if self.rest is None else self.rest.get_quantize_ops()

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.rest is None else self.rest.get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        return (
            weight_conversions if self.rest is None else self.rest.update_weight_conversions(weight_conversions, *model)
        )


def _quantizer_of(rest: dict[str, Any], *args: Any, **kwargs: Any) -> HfQuantizer:
    """What loads weights that are in no container: transformers' own quantizer where it computes with them as they are, on a
    GPU; else one that reads them as numbers, as all else in Locum does."""
    method = rest["quant_method"]
    own = AutoHfQuantizer.from_config(rest, pre_quantized=True) if _is_handed_over(method, kwargs) else None
    if own is not None:
        own.validate_environment(*args, **kwargs)
        if not is_possible() or not getattr(own.quantization_config, "dequantize", False):
            return own
    if not is_possible():
        raise UnsupportedModel(
            f"this transformers does not read checkpoints that are quantised with {method!r}; open this one by "
            f"locum.load_model, or install transformers 5.23 or newer"
        )
    return NumbersQuantizer(rest)


def _is_handed_over(method: str, options: dict[str, Any]) -> bool:
    if not is_possible():
        return method in AUTO_QUANTIZER_MAPPING
    return method in COMPUTED_WITH and is_on_accelerator(options.get("device_map"))


def _check_files(model: PreTrainedModel, files: Files) -> None:
    """Refuse damaged files and tensors of another shape, and containers whose tensors are not there: transformers would
    make them, as large as config.json says, before anybody sees that they are missing."""
    headers = {name: entry for header in files.values() for name, entry in header.items()}
    found = {place.name for place in check_shapes(model, headers).values()}
    names = (f"{name}.{tensor}" for name, module in containers_of(model) for tensor in module.layout.tensor_shapes())
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(f"{len(missing)} tensors are missing (first: {min(missing)}); fetch it again")


def _check_loaded(model: PreTrainedModel) -> None:
    """Refuse what a file lacks, which transformers fills with random numbers or whatever memory holds, and containers
    whose tensors are not those of their layout: transformers 5.17 takes whatever the file holds."""
    may_lack = model._keys_to_ignore_on_load_missing or ()
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or any(re.search(pattern, name) for pattern in may_lack):
            continue
        if not getattr(parameter, "_is_hf_initialized", False):
            raise CheckpointError(f"tensors are missing (first: {name}); fetch it again")
    for name, container in containers_of(model):
        for tensor, shape in container.layout.tensor_shapes().items():
            check_shape(f"{name}.{tensor}", tuple(container.get_parameter(tensor).shape), shape)
