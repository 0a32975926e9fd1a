"""Checkpoints: what a folder holds, loading it, saving a compressed model, and the hook that loads that again.

A layer that the stock layout cannot hold is named in `config.json`:

    "quantization_config": {"quant_method": "locum", "format_version": 1, "layers": {experts module: layout}}

`import locum` registers a quantizer for it. Before weights load, it puts containers where the config says, and the
ordinary `AutoModelForCausalLM.from_pretrained` does the rest. Nothing executable is ever loaded.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .artefacts import fingerprint
from .container import StandInExperts
from .errors import CheckpointError, LocumError, UnsupportedModel
from .families import (
    MoeLayer,
    canonical_gate,
    find_layers,
    model_class,
    notes_on,
    slice_router,
    unread_tensors,
)
from .layout import Layout
from .shapes import LayerShape, ModelShape
from .stored import DTYPES, note_stored, stored_dtype

FORMAT_VERSION = 1
SUBSTITUTED = "approximate_experts"  # a config entry of the form that is for vLLM alone (substitution.py)
ADAPTER = "vectors.safetensors"  # instead of weights, in a folder that needs a base (adapter.py)
WRONG_KEYS = {
    "missing_keys": "tensors are missing",
    "unexpected_keys": "tensors have no place in the model that config.json describes",
    "mismatched_keys": "tensors have another shape than config.json says",
}
UNIMPORTANT = ("_name_or_path", "transformers_version")  # config entries that say nothing of the model
ITEMSIZE = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


@register_quantization_config("locum")
class LocumConfig(QuantizationConfigMixin):
    """Which layers of a checkpoint are containers, and their layouts."""

    def __init__(
        self, layers: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION, **kwargs: Any
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has Locum format version {format_version!r}; this Locum reads version {FORMAT_VERSION}; "
                f"install the version that wrote it, or a newer one"
            )
        if not isinstance(layers or {}, dict):
            raise CheckpointError(f"config.json lists Locum's layers as {layers!r}; expected a table of layer names")
        self.quant_method = "locum"  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = layers or {}


@register_quantizer("locum")
class LocumQuantizer(HfQuantizer):
    """Puts containers into the empty model, then steps aside: afterwards it is an ordinary, trainable model."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        place_containers(model, self.quantization_config.layers)
        _check_files(model, checkpoint_files or [])
        if hasattr(model.config, "auto_map"):  # names a file that saving the model does not write (remote_code.py)
            del model.config.auto_map

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # The config keeps the layouts, so saving works; without a quantizer, .half(), Trainer and PEFT work as usual.
        del model.hf_quantizer
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        _check_loaded(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_files(model: nn.Module, files: list[str]) -> None:
    """Refuse damaged files, and tensors of another shape than their container's, which transformers calls missing."""
    headers = {name: entry for file in files for name, entry in read_header(Path(file)).items()}
    for name, container in _containers(model):
        for tensor, shape in container.layout.tensor_shapes().items():
            if entry := headers.get(f"{name}.{tensor}"):
                check_shape(f"{name}.{tensor}", tuple(entry["shape"]), shape)


def _check_loaded(model: PreTrainedModel) -> None:
    """Refuse what a file lacks, which transformers fills with random numbers or whatever memory holds, and containers
    whose tensors are not those of their layout: transformers 5.17 takes whatever the file holds."""
    may_lack = model._keys_to_ignore_on_load_missing or ()
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or any(re.search(pattern, name) for pattern in may_lack):
            continue
        if not getattr(parameter, "_is_hf_initialized", False):
            raise CheckpointError(f"tensors are missing (first: {name}); fetch the checkpoint again")
    for name, container in _containers(model):
        for tensor, shape in container.layout.tensor_shapes().items():
            check_shape(f"{name}.{tensor}", tuple(container.get_parameter(tensor).shape), shape)


def _containers(model: nn.Module) -> list[tuple[str, StandInExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, StandInExperts)]


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a container's tensor of another shape than its layout gives it."""
    if found != expected:
        raise CheckpointError(
            f"{name} has shape {list(found)} in the file, but config.json lays out {list(expected)}; fetch the "
            f"checkpoint again"
        )


def place_containers(model: PreTrainedModel, layers: dict[str, Any]) -> None:
    """Swap the experts modules named in `layers` for empty containers, and make room in their routers."""
    found = {layer.shape.name: layer for layer in find_layers(model)}
    for name, data in layers.items():
        if name not in found:
            raise CheckpointError(f"config.json describes a container for {name!r}, which this model does not have")
        layer, layout = found[name], _read_layout(name, data, found[name].shape)
        weight = layer.experts.down_proj
        container = StandInExperts(layout, canonical_gate(layer.experts), weight.dtype, weight.device)
        container.post_expert_norm = getattr(layer.experts, "post_expert_norm", None)
        set_module(model, name, container)
        layer.block._is_hf_initialized = True  # some families' blocks would initialise the stock experts' own tensors
        if layout.num_experts != layer.shape.num_experts:
            slice_router(layer, layout.num_experts)


def _read_layout(name: str, data: Any, shape: LayerShape) -> Layout:
    """The layout of one container, checked against the stock layer that it replaces."""
    try:
        layout = Layout.from_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    for entry in ("hidden_size", "expert_width", "has_gate", "has_bias"):
        if getattr(layout, entry) != getattr(shape, entry):
            raise CheckpointError(
                f"config.json says {entry}={getattr(layout, entry)} for the container {name}, but the layer of the model "
                f"has {getattr(shape, entry)}; restore the config.json that was written with the weights"
            )
    if not shape.fewest_experts <= layout.num_experts <= shape.num_experts:
        raise CheckpointError(
            f"config.json gives the container {name} {layout.num_experts} experts; the layer can have "
            f"{shape.fewest_experts} to {shape.num_experts}; restore the config.json that was written with the weights"
        )
    if layout.routing is not None and layout.routing.main > shape.top_k:
        raise CheckpointError(
            f"config.json lets {layout.routing.main} experts of {name} run for a token, but its router selects "
            f"{shape.top_k}; restore the config.json that was written with the weights"
        )
    return layout


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def read_config(path: str | Path) -> PreTrainedConfig:
    """The config of a checkpoint folder, or one clear error."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no such folder: {path}; give the path of a checkpoint folder with a config.json")
    if not path.is_dir() or not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a model: expected a folder with config.json and safetensors files")
    entries = read_json(path / "config.json")
    if SUBSTITUTED in entries:
        raise UnsupportedModel(f"{path} is in a form for vLLM alone; give the checkpoint that it was exported from")
    kind = entries.get("model_type")
    if kind is None:
        raise CheckpointError(f"{path / 'config.json'} names no model_type, so {path} is not a transformers checkpoint")
    if kind not in CONFIG_MAPPING:
        known = difflib.get_close_matches(str(kind), CONFIG_MAPPING, n=3, cutoff=0.8)
        hint = f" (did you mean {' or '.join(known)}?)" if known else ""
        raise UnsupportedModel(
            f"{path}: the installed transformers does not know the model type {kind!r}{hint}; update transformers if "
            f"the model is new"
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except LocumError:
        raise
    except Exception as error:  # every family checks its entries in its own way
        raise CheckpointError(f"{path / 'config.json'} is not a config of {kind!r}: {error!s:.300}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, or one clear error."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}; copy or download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__} where a JSON object is needed; download it again")
    return data


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds vectors and routers alone, over the weights of a base."""
    return (Path(path) / ADAPTER).is_file()


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises when one that the index names is missing."""
    if is_adapter(path):
        return [path / ADAPTER]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} names no files in a 'weight_map'; download it again") from error
        if missing := [name for name in names if not (path / name).is_file()]:
            raise CheckpointError(f"{path} lacks shard {missing[0]} that its index names; download it again")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if any(path.glob("*.bin")):
        raise CheckpointError(f"{path} holds .bin weights, which can run code when loaded; convert them to safetensors")
    raise CheckpointError(f"{path} has no model.safetensors and no model.safetensors.index.json; fetch its weights")


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor entries (dtype, shape, data_offsets) of one safetensors file, checked against the length of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{file} is no safetensors file, or truncated ({size:,} bytes); fetch it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a safetensors file ({_first_line(error)}); fetch it again") from error
    if needed != size:
        raise CheckpointError(
            f"{file} is damaged: its header asks for {needed:,} bytes, it has {size:,}; fetch it again"
        )
    return header


def read_headers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Tensor entries of a whole checkpoint folder by name."""
    headers: dict[str, dict[str, Any]] = {}
    for header in _file_headers(path).values():
        headers |= header
    return headers


def _file_headers(path: str | Path) -> dict[Path, dict[str, dict[str, Any]]]:
    return {file: read_header(file) for file in shard_files(Path(path))}


def fingerprint_checkpoint(path: str | Path) -> str:
    """A hash of what a checkpoint holds: every header, and a sample of the bytes of every tensor."""
    path = Path(path)
    config = {k: v for k, v in read_json(path / "config.json").items() if k not in UNIMPORTANT}
    parts: list[bytes | str] = [json.dumps(config, sort_keys=True)]
    for file in shard_files(path):
        header = read_header(file)
        parts.append(json.dumps(header, sort_keys=True))
        with file.open("rb") as stream:
            start = 8 + struct.unpack("<Q", stream.read(8))[0]
            for entry in header.values():
                begin, end = entry["data_offsets"]
                stream.seek(start + begin + (end - begin) // 2)
                parts.append(stream.read(256))
    return fingerprint(*parts)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, in the dtypes it will have when loaded, containers in place."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    layers = _locum_layers(config)
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=dtype)
    if wide := model._get_dtype_plan(dtype):  # some tensors stay float32 whatever the rest, such as selection biases
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search("|".join(key.replace("*", ".*") for key in wide), name):
                tensor.data = tensor.data.float()
    if layers:
        place_containers(model, layers)
    return model


def _locum_layers(config: PreTrainedConfig) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return {}
    data = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if data.get("quant_method") != "locum":
        raise UnsupportedModel(
            f"the checkpoint is quantised with {data.get('quant_method')!r}; Locum compresses unquantised checkpoints: "
            f"compress first, quantise afterwards"
        )
    return LocumConfig(**{k: v for k, v in data.items() if k != "quant_method"}).layers


def is_compressed(config: PreTrainedConfig) -> bool:
    return bool(_locum_layers(config))


def read_shape(path: str | Path) -> ModelShape:
    """The shape of a checkpoint from its config and safetensors headers; no weight is read."""
    config = read_config(path)
    headers = read_headers(path)
    if config.dtype is None:  # transformers then takes that of the weights
        config.dtype = next((DTYPES[e["dtype"]] for e in headers.values() if e["dtype"] in DTYPES), None)
    model, layers = _layers_of(path, config)
    if is_adapter(path):  # as large as what base and adapter make together
        from .adapter import base_of

        if ((base := base_of(Path(path))) / "config.json").is_file():
            note_stored(model, _file_headers(base) | _file_headers(path))
        return replace(shape_of(model), notes=notes_on(model, layers, frozenset()))
    note_stored(model, _file_headers(path))
    unread = unread_tensors(model, headers)
    again = {tied for tied, source in model.all_tied_weights_keys.items() if source in headers}  # the same, twice
    headers = {name: entry for name, entry in headers.items() if name not in unread | again}
    counts = [_numel(entry) for entry in headers.values()]
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in headers.values()]
    expert_sizes = {
        ITEMSIZE[e["dtype"]] for name, e in headers.items() if ".experts." in name and e["dtype"] in ITEMSIZE
    }
    itemsize = max(expert_sizes, default=_expert_itemsize(model, layers[0]))
    shapes, notes = _stored_shapes(model, layers), notes_on(model, layers, unread)
    return ModelShape(config.model_type, shapes, sum(counts), sum(sizes), itemsize, notes)


def _layers_of(path: str | Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, tuple[MoeLayer, ...]]:
    try:
        model = skeleton(config)
        return model, find_layers(model)
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error


def layouts_of(path: str | Path) -> dict[str, Layout]:
    """The layouts of a checkpoint's containers by the names of their layers."""
    return {name: Layout.from_json(data) for name, data in _locum_layers(read_config(path)).items()}


def expert_parameters(path: str | Path, shape: ModelShape) -> int:
    """What a checkpoint stores for its routed experts; in compressed ones, what stands in for them."""
    containers, count = layouts_of(path), 0
    for layer in shape.layers:
        if layer.name in containers:
            shapes = containers[layer.name].tensor_shapes()
            count += sum(math.prod(tensor_shape) for tensor_shape in shapes.values())
        else:
            count += layer.num_experts * layer.parameters()
    return count


def active_parameters(path: str | Path, shape: ModelShape) -> int:
    """The most parameters of a checkpoint that one token uses (locum.layout.active_parameters)."""
    containers, count = layouts_of(path), shape.parameters - expert_parameters(path, shape)
    for layer in shape.layers:
        there = containers.get(layer.name)
        count += there.active_parameters(layer.top_k) if there else layer.top_k * layer.parameters()
    return count


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a live model, counted from its tensors (tied ones once), as `write_model` would write them."""
    layers = find_layers(model)
    tensors = {
        t.data_ptr() if t.device.type != "meta" else id(t): (t.numel(), stored_dtype(model, name, t).itemsize)
        for name, t in model.state_dict(keep_vars=True).items()
    }
    total, size = sum(numel for numel, _ in tensors.values()), sum(math.prod(x) for x in tensors.values())
    itemsize = _expert_itemsize(model, layers[0])
    return ModelShape(model.config.model_type, _stored_shapes(model, layers), total, size, itemsize)


def _expert_itemsize(model: PreTrainedModel, layer: MoeLayer) -> int:
    name, parameter = next(layer.experts.named_parameters())
    return stored_dtype(model, f"{layer.shape.name}.{name}", parameter).itemsize


def _stored_shapes(model: PreTrainedModel, layers: tuple[MoeLayer, ...]) -> tuple[LayerShape, ...]:
    """The shapes of layers, with routers as large as their files have them."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}

    def size(layer: MoeLayer) -> int:
        tensors = ((part.numel, part.tensor) for part in layer.per_expert)
        return sum(numel * stored_dtype(model, names[id(tensor)], tensor).itemsize for numel, tensor in tensors)

    return tuple(replace(layer.shape, router_bytes=size(layer)) for layer in layers)


def _numel(entry: dict[str, Any]) -> int:
    count = 1
    for side in entry["shape"]:
        count *= side
    return count


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A checkpoint as a live model in eval mode. Every tensor must be there and have its place."""
    config = read_config(path)
    _layers_of(path, config)  # refuse what is unsupported before reading gigabytes
    headers = _file_headers(path)
    if is_adapter(path):
        from .adapter import load_adapted  # which loads the base through this very function

        return load_adapted(Path(path), dtype, device)
    model, info = model_class(config).from_pretrained(
        path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )  # mismatched sizes are not ignored: they are in `info`, by name
    for what, words in WRONG_KEYS.items():
        if info.get(what):
            first = min(map(str, info[what]))
            raise CheckpointError(f"{path}: {len(info[what])} {words} (first: {first}); fetch the checkpoint again")
    if dtype == "auto":
        note_stored(model, headers)
    return model.to(device).eval()


def vectors_and_routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, by name, that make a model with routing policies out of its base: what an adapter file holds."""
    found: dict[str, nn.Parameter] = {}
    for layer in find_layers(model):
        routers = layer.router.named_parameters()
        found |= {f"{layer.shape.router}.{name}": p for name, p in routers if p.is_floating_point()}
        if getattr(layer.experts, "offsets_NV", None) is not None:
            found[f"{layer.shape.name}.offsets_NV"] = layer.experts.offsets_NV
    return found


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder. transformers makes one without words where there are no files: refused."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has no usable tokenizer: {_first_line(error)}; copy its files there") from error
    if not tokenizer("a 1", add_special_tokens=False)["input_ids"]:
        raise CheckpointError(f"{path} has no usable tokenizer: it makes no tokens of text; copy its files there")
    return tokenizer
