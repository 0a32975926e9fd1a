"""What a checkpoint folder holds, without building a model: config, headers, fingerprint, tokenizer.

Which files are its weights, weight_files.py says: the same to whoever reads, sizes, fingerprints or loads them.
No code of a checkpoint is ever run.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointError, LocumError, UnsupportedModel
from ..files import NOTES, fingerprint
from ..formats.plain import ENTRY_BYTES, FLOAT_ENTRIES
from ..json_text import parse_json
from ..places import find
from .fit import check_sizes
from .inside import check_links, read_json
from .weight_files import PEFT, is_adapter, shard_files

DTYPES = tuple(FLOAT_ENTRIES.values())  # in which a model can be computed
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
SUBSTITUTED = "approximate_experts"  # a config entry of the form that is for vLLM alone (substitution.py)
UNIMPORTANT = ("_name_or_path", "transformers_version")  # config entries that say nothing of the model


def read_config(path: str | Path) -> PreTrainedConfig:
    """The config of a checkpoint folder, or one clear error."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no such folder: {path}; give the path of a checkpoint folder with a config.json")
    if path.is_dir() and (path / PEFT).is_file() and not (path / "config.json").is_file():
        raise UnsupportedModel(f"{path} holds an adapter of PEFT, no model; merge it into its base and save the whole")
    if not path.is_dir() or not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a model: expected a folder with config.json and safetensors files")
    check_links(path)
    entries = read_json(path / "config.json")
    if SUBSTITUTED in entries:
        raise UnsupportedModel(f"{path} is in a form for vLLM alone; give the checkpoint that it was exported from")
    kind = entries.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type, so {path} is not a transformers checkpoint")
    if kind not in CONFIG_MAPPING:
        known = difflib.get_close_matches(kind, CONFIG_MAPPING, n=3, cutoff=0.8)
        hint = f" (did you mean {' or '.join(known)}?)" if known else ""
        raise UnsupportedModel(
            f"{path}: the installed transformers does not know the model type {kind!r}{hint}; update transformers if "
            f"the model is new"
        )
    check_sizes(entries, str(path / "config.json"))
    _check_dtypes(entries, str(path / "config.json"))
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except LocumError:
        raise
    except Exception as error:  # every family checks its entries in its own way
        raise CheckpointError(f"{path / 'config.json'} is not a config of {kind!r}: {error!s:.300}") from error


def _check_dtypes(entries: dict[str, Any], where: str) -> None:
    """Refuse a name that is no dtype a model can be computed in, in a config or in those of its parts."""
    for key in ("dtype", "torch_dtype"):
        name = entries.get(key)
        if name is not None and (not isinstance(name, str) or getattr(torch, name, None) not in DTYPES):
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise CheckpointError(
                f"{where} says {key}={name!r}, in which no model is computed; allowed: {allowed}; name the one that the "
                f"weights are to be computed in"
            )
    for key, part in entries.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(part, dict):
            _check_dtypes(part, f"{where}, {key},")


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor entries (dtype, shape, data_offsets) of one safetensors file, checked against the length of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if 8 + length > size or length > LONGEST_HEADER:
            raise CheckpointError(f"{file} is no safetensors file, or truncated ({size:,} bytes); fetch it again")
        try:
            header = parse_json(stream.read(length))
            header.pop("__metadata__", None)
            wrong = next((name for name, entry in header.items() if not _is_entry(entry)), None)
            needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a safetensors file ({first_line(error)}); fetch it again") from error
    if needed != size:
        raise CheckpointError(
            f"{file} is damaged: its header asks for {needed:,} bytes, it has {size:,}; fetch it again"
        )
    if wrong is not None:
        raise CheckpointError(f"{file} is damaged: what its header says of {wrong} is not possible; fetch it again")
    return header


def data_start(file: Path) -> int:
    """Where the bytes of the tensors of a safetensors file begin; `data_offsets` count from there."""
    with file.open("rb") as stream:
        return 8 + struct.unpack("<Q", stream.read(8))[0]


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether a tensor's numbers agree: sizes that are whole, and as many bytes as they need."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(entry["dtype"], str):
        return False
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        return False
    itemsize = ENTRY_BYTES.get(entry["dtype"])
    return begin <= end and (itemsize is None or end - begin == math.prod(shape) * itemsize)


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
    """The base that an adapter folder names: beside it, or where it was last seen; where it should be, if it is not there.

    Raises CheckpointError where it names none, or one that is none.
    """
    about = about_adapter(folder)
    named, mark = str(about.get("base")), about.get("base_fingerprint")
    beside = Path(os.path.abspath(folder)).parent
    found = find(named, mark if isinstance(mark, str) else None, beside, fingerprint_checkpoint)
    base = found.place or found.other or beside / named
    if is_adapter(base):
        raise CheckpointError(
            f"{folder} is an adapter over {base}, which is an adapter itself; put back the checkpoint that it was made for"
        )
    return base


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
        start = data_start(file)
        with file.open("rb") as stream:
            for entry in header.values():
                begin, end = entry["data_offsets"]
                stream.seek(start + begin + (end - begin) // 2)
                parts.append(stream.read(256))
    return fingerprint(*parts)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder. transformers makes one without words where there are no files: refused.

    Code that a folder brings for it is not run: a tokenizer that transformers does not have itself is refused.
    """
    check_links(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        ids = tokenizer("a 1", add_special_tokens=False)["input_ids"]
    except Exception as error:  # every tokenizer reads its files in its own way
        raise CheckpointError(f"{path} has no usable tokenizer: {first_line(error)}; copy its files there") from error
    if not ids:
        raise CheckpointError(f"{path} has no usable tokenizer: it makes no tokens of text; copy its files there")
    return tokenizer
