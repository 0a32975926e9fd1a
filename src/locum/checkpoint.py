"""Checkpoints: what a folder holds, loading it, saving a compressed model, and the hook that loads that again.

A layer that the stock layout cannot hold is named in `config.json`:

    "quantization_config": {"quant_method": "locum", "format_version": 1, "layers": {experts module: layout}}

`import locum` registers a quantizer for it. Before weights load, it puts containers where the config says, and the
ordinary `AutoModelForCausalLM.from_pretrained` does the rest. Nothing executable is ever loaded.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .artefacts import fingerprint
from .container import StandInExperts
from .errors import CheckpointError, UnsupportedModel
from .families import canonical_gate, find_layers, slice_router
from .layout import Layout
from .shapes import ModelShape

FORMAT_VERSION = 1
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
        self.quant_method = "locum"  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = layers or {}


@register_quantizer("locum")
class LocumQuantizer(HfQuantizer):
    """Puts containers into the empty model, then steps aside: afterwards it is an ordinary, trainable model."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        place_containers(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # The config keeps the layouts, so saving works; without a quantizer, .half(), Trainer and PEFT work as usual.
        del model.hf_quantizer
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def place_containers(model: PreTrainedModel, layers: dict[str, Any]) -> None:
    """Swap the experts modules named in `layers` for empty containers, and make room in their routers."""
    found = {layer.shape.name: layer for layer in find_layers(model)}
    for name, data in layers.items():
        if name not in found:
            raise CheckpointError(f"config.json describes a container for {name!r}, which this model does not have")
        layer, layout = found[name], Layout.from_json(data)
        weight = layer.experts.down_proj
        set_module(model, name, StandInExperts(layout, canonical_gate(layer.experts), weight.dtype, weight.device))
        if layout.num_experts != layer.shape.num_experts:
            slice_router(layer.router, layout.num_experts)


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
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / 'config.json'} is not valid JSON: {error}") from error
    except (ValueError, KeyError, OSError) as error:
        kind = data.get("model_type")
        raise UnsupportedModel(
            f"{path}: model type {kind!r} is not known to the installed transformers; {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises when one that the index names is missing."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}; download it again") from error
        if missing := [name for name in names if not (path / name).is_file()]:
            raise CheckpointError(f"{path} lacks shard {missing[0]} that its index names; download it again")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if any(path.glob("*.bin")):
        raise CheckpointError(f"{path} holds .bin weights, which can run code when loaded; convert them to safetensors")
    raise CheckpointError(f"{path} has no model.safetensors and no model.safetensors.index.json")


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor entries (dtype, shape, data_offsets) of one safetensors file, checked against the length of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{file} is truncated: its header alone needs {8 + length:,} bytes, it has {size:,}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed != size:
        raise CheckpointError(
            f"{file} is damaged: its header asks for {needed:,} bytes, it has {size:,}; fetch it again"
        )
    return header


def read_headers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Tensor entries of a whole checkpoint folder by name."""
    headers: dict[str, dict[str, Any]] = {}
    for file in shard_files(Path(path)):
        headers |= read_header(file)
    return headers


def fingerprint_checkpoint(path: str | Path) -> str:
    """A hash of what a checkpoint holds: every header, and a sample of the bytes of every tensor."""
    path = Path(path)
    parts: list[bytes | str] = [json.dumps(read_config(path).to_dict(), sort_keys=True, default=str)]
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
    """The model of a config without weights, containers in place."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    layers = _locum_layers(config)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise UnsupportedModel(
                f"model type {config.model_type!r} is not a causal LM: {_first_line(error)}"
            ) from error
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
    model = skeleton(config)
    layers = find_layers(model)
    headers = read_headers(path)
    counts = [_numel(entry) for entry in headers.values()]
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in headers.values()]
    expert_sizes = {
        ITEMSIZE[e["dtype"]] for name, e in headers.items() if ".experts." in name and e["dtype"] in ITEMSIZE
    }
    itemsize = max(expert_sizes, default=next(layers[0].experts.parameters()).element_size())
    return ModelShape(config.model_type, tuple(x.shape for x in layers), sum(counts), sum(sizes), itemsize)


def expert_numels(path: str | Path) -> list[int]:
    """Sizes of the tensors that a checkpoint stores for its routed experts, containers included."""
    return [_numel(entry) for name, entry in read_headers(path).items() if ".experts." in name]


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a live model, counted from its tensors (tied ones once), as `save_pretrained` would write them."""
    layers = find_layers(model)
    tensors = {t.data_ptr() if t.device.type != "meta" else id(t): t for t in model.state_dict(keep_vars=True).values()}
    itemsize = next(layers[0].experts.parameters()).element_size()
    total, size = (
        sum(f(t) for t in tensors.values()) for f in (torch.Tensor.numel, lambda t: t.numel() * t.element_size())
    )
    return ModelShape(model.config.model_type, tuple(x.shape for x in layers), total, size, itemsize)


def _numel(entry: dict[str, Any]) -> int:
    count = 1
    for side in entry["shape"]:
        count *= side
    return count


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A checkpoint as a live model in eval mode. Every tensor must be there and have its place."""
    config = read_config(path)
    find_layers(skeleton(config))  # refuse what is unsupported before reading gigabytes
    read_headers(path)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            first = min(map(str, info[what]))
            raise CheckpointError(f"{path}: {len(info[what])} {what.replace('_', ' ')}, for example {first}")
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has no usable tokenizer: {_first_line(error)}; copy its files there") from error
