"""What a checkpoint folder holds, without building a model: config, headers, shards, fingerprint, tokenizer."""

from __future__ import annotations

import difflib
import json
import struct
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointError, LocumError, UnsupportedModel
from ..files import NOTES, fingerprint

SUBSTITUTED = "approximate_experts"  # a config entry of the form that is for vLLM alone (substitution.py)
ADAPTER = "vectors.safetensors"  # instead of weights, in a folder that needs a base (adapter.py)
UNIMPORTANT = ("_name_or_path", "transformers_version")  # config entries that say nothing of the model


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


def first_line(error: BaseException) -> str:
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
            raise CheckpointError(f"{file} is not a safetensors file ({first_line(error)}); fetch it again") from error
    if needed != size:
        raise CheckpointError(
            f"{file} is damaged: its header asks for {needed:,} bytes, it has {size:,}; fetch it again"
        )
    return header


def read_headers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Tensor entries of a whole checkpoint folder by name."""
    headers: dict[str, dict[str, Any]] = {}
    for header in file_headers(path).values():
        headers |= header
    return headers


def file_headers(path: str | Path) -> dict[Path, dict[str, dict[str, Any]]]:
    """The same by file."""
    return {file: read_header(file) for file in shard_files(Path(path))}


def base_of(folder: Path) -> Path:
    """The base that an adapter folder names. Raises CheckpointError where it names none."""
    return Path(str(about_adapter(folder).get("base")))


def about_adapter(folder: Path) -> dict[str, Any]:
    """What an adapter folder says of itself."""
    about = read_json(folder / NOTES).get("adapter") if (folder / NOTES).is_file() else None
    if not isinstance(about, dict):
        raise CheckpointError(f"{folder} is not an adapter: its {NOTES} names no base; fetch it again")
    return about


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


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder. transformers makes one without words where there are no files: refused."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has no usable tokenizer: {first_line(error)}; copy its files there") from error
    if not tokenizer("a 1", add_special_tokens=False)["input_ids"]:
        raise CheckpointError(f"{path} has no usable tokenizer: it makes no tokens of text; copy its files there")
    return tokenizer
