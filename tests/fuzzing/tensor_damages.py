"""Damages of the tensors in safetensors files, by their bytes alone: values, names, shapes and dtypes that still fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from .damages import NotHere, damages

ALIKE = {
    "F32": ("I32", "U32"),
    "BF16": ("F16", "I16"),
    "F16": ("BF16", "I16"),
    "F64": ("I64",),
    "I64": ("F64",),
    "U8": ("I8", "BOOL"),
}
PATTERNS = {"zeros": b"\0", "NaN": b"\xff", "huge numbers": b"\x7f", "tiny numbers": b"\1"}


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it. Raises NotHere for a file that is damaged already."""
    data = path.read_bytes()
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError, RecursionError):
        raise NotHere from None
    if not isinstance(header, dict) or not header:
        raise NotHere
    return header, data[8 + length :]


def write_parts(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def read_tensors(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], Any]:
    """(dtype, shape, bytes) of every tensor, and the metadata. Raises NotHere for a file that is damaged already."""
    header, body = read_parts(path)
    metadata = header.pop("__metadata__", None)
    try:
        return {
            name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }, metadata
    except (KeyError, TypeError, AttributeError):
        raise NotHere from None


def _write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any) -> None:
    header, body = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    write_parts(path, json.dumps(header).encode(), body)


def _drawn(path: Path, draw: Random) -> tuple[dict[str, tuple[str, list[int], bytes]], Any, str]:
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise NotHere
    return tensors, metadata, draw.choice(sorted(tensors))


@damages("weights", "tensors")
def values(path: Path, draw: Random) -> str:
    tensors, metadata, name = _drawn(path, draw)
    dtype, shape, data = tensors[name]
    pattern, part = draw.choice(sorted(PATTERNS)), draw.choice(("all", "one"))
    step = len(data) if part == "all" else max(1, min(8, len(data)))
    tensors[name] = (dtype, shape, PATTERNS[pattern] * step + data[step:])
    _write_tensors(path, tensors, metadata)
    return f"{name}: {'all numbers are' if part == 'all' else 'the first are'} {pattern}"


@damages("weights", "tensors")
def noise(path: Path, draw: Random) -> str:
    tensors, metadata, name = _drawn(path, draw)
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, draw.randbytes(len(data)))
    _write_tensors(path, tensors, metadata)
    return f"{name}: noise"


@damages("weights", "tensors")
def tensor_gone(path: Path, draw: Random) -> str:
    tensors, metadata, name = _drawn(path, draw)
    del tensors[name]
    _write_tensors(path, tensors, metadata)
    return f"{name}: taken out"


@damages("weights", "tensors")
def tensor_renamed(path: Path, draw: Random) -> str:
    tensors, metadata, name = _drawn(path, draw)
    new = draw.choice((name + "x", name.replace("0", "7"), name.upper(), "", "|", draw.choice(sorted(tensors))))
    tensors[new] = tensors.pop(name)
    _write_tensors(path, tensors, metadata)
    return f"{name}: renamed to {new!r}"


@damages("weights", "tensors")
def tensor_added(path: Path, draw: Random) -> str:
    tensors, metadata, name = _drawn(path, draw)
    new = draw.choice((f"{name}.copy", "x", "model.layers.99.mlp.gate.weight", f"{name}|x"))
    tensors[new] = tensors[name]
    _write_tensors(path, tensors, metadata)
    return f"{name}: there as {new!r} too"


@damages("weights", "tensors")
def shape_changed(path: Path, draw: Random) -> str:
    """To another that has as many numbers, or to one row less with its bytes."""
    tensors, metadata, name = _drawn(path, draw)
    dtype, shape, data = tensors[name]
    size, rows = len(data), shape[0] if shape else 0
    less = ([rows - 1, *shape[1:]], data[: size - size // rows]) if rows else (shape, data)
    new, data = draw.choice(((shape[::-1], data), ([*shape, 1], data), ([1, *shape], data), less))
    tensors[name] = (dtype, new, data)
    _write_tensors(path, tensors, metadata)
    return f"{name}: shape {shape} becomes {new}"


@damages("weights", "tensors")
def dtype_changed(path: Path, draw: Random) -> str:
    tensors, metadata, name = _drawn(path, draw)
    dtype, shape, data = tensors[name]
    if dtype not in ALIKE:
        raise NotHere
    new = draw.choice(ALIKE[dtype])
    tensors[name] = (new, shape, data)
    _write_tensors(path, tensors, metadata)
    return f"{name}: {dtype} becomes {new}"
