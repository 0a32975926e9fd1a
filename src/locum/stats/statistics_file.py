"""Statistics files on disk: one safetensors file, notes in its metadata.

Version 2 has an entry for everything that decides something. Version 1 kept that in the provenance; it is still read.
"""

from __future__ import annotations

import json
import struct
from collections import ChainMap
from dataclasses import asdict
from operator import index
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import StatisticsError
from ..files import CHECKSUM, checksum, read_tensors, whole
from ..json_text import parse_json
from ..places import bare
from ..shapes import ModelShape
from .on_disk import FromFile
from .origin import Origin, SearchedBy
from .sums import Statistics, is_pooled

STATISTICS_VERSION = 2


def save_statistics(statistics: Statistics, path: Path) -> None:
    """One safetensors file: tensors "layer|statistic", everything else as JSON in the metadata. One tensor is held at a time."""
    notes = {
        "format_version": STATISTICS_VERSION,
        "id": statistics.id,
        "domains": list(statistics.domains),
        "origin": asdict(statistics.origin),
        "tokens": statistics.tokens,
        "searched": None if statistics.searched is None else asdict(statistics.searched),
        "next_block": statistics.next_block,
        "asked": statistics.asked,
        "provenance": bare(statistics.provenance),
    }
    places = {f"{layer}|{name}": (layer, name) for layer, named in statistics.layers.items() for name in named}
    small = {key: statistics.layers[layer][name] for key, (layer, name) in places.items() if not _is_large(key)}
    said = {"locum-statistics": json.dumps(notes)}
    header: dict[str, Any] = {"__metadata__": {**said, CHECKSUM: checksum(small, said)}}
    end = 0
    for key, (layer, name) in sorted(places.items()):
        tensor = statistics.layers[layer][name]
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as scratch, scratch.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, (layer, name) in sorted(places.items()):
            stream.write(memoryview(statistics.layers[layer][name].contiguous().reshape(-1).numpy()).cast("B"))


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file. Raises StatisticsError, naming the file, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise StatisticsError(
            f"no statistics file at {path}; make one with: locum calibrate MODEL --data ... --out {path} (locum search, where a "
            f"method searches)"
        )
    try:
        tensors, header = read_tensors(path, but=_is_large)
        large = FromFile.open(path, _is_large)
    except OSError as error:
        raise StatisticsError(f"statistics {path} cannot be read: {error.strerror}; let this user read it") from error
    except (SafetensorError, ValueError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file, or is damaged ({error}); make one with: locum calibrate"
        ) from error
    try:
        notes = parse_json(header.get("locum-statistics", "{}"))
        if notes.get("format_version") not in (1, STATISTICS_VERSION):
            raise StatisticsError(
                f"{path} is not a Locum statistics file of version 1 or {STATISTICS_VERSION} "
                f"(found {notes.get('format_version')!r}); make one with: locum calibrate"
            )
        notes = _from_version_1(notes) if notes["format_version"] == 1 else notes
        data, found = notes["origin"], notes["searched"]
        shape, fingerprints = ModelShape.from_json(data["shape"]), tuple(data["data_fingerprints"])
        origin = Origin(shape, data["model_fingerprint"], data["tokenizer_fingerprint"], fingerprints)
        searched = None if found is None else SearchedBy(str(found["name"]), dict(found["options"]))
        domains, tokens = tuple(map(str, notes["domains"])), int(notes["tokens"])
        words, next_block, asked = dict(notes["provenance"]), notes["next_block"], notes.get("asked")
        next_block, asked = None if next_block is None else index(next_block), None if asked is None else dict(asked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StatisticsError(f"statistics {path} have damaged notes ({error!r}); calibrate again") from error
    held: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in shape.layers}
    keys: dict[str, dict[str, str]] = {layer.name: {} for layer in shape.layers}
    for key in (*tensors, *large):
        layer, _, name = key.partition("|")
        if layer not in held:
            raise StatisticsError(
                f"statistics {path} have sums of {layer!r}, a layer that they do not name; calibrate again"
            )
        if key in tensors:
            held[layer][name] = tensors[key]
        else:
            keys[layer][name] = key
    layers = {layer: ChainMap(held[layer], large.named(keys[layer])) for layer in held}
    made = Statistics(domains, layers, origin, tokens, words, searched, next_block, asked)
    if (
        notes.get("id", made.id) != made.id
    ):  # of large sums, which stay on the disk and are in no checksum, it has a sample
        raise StatisticsError(
            f"{path} is damaged (numbers have changed since they were written); copy the file again, or calibrate again"
        )
    return made


def _is_large(key: str) -> bool:
    return is_pooled(key.partition("|")[2])


def statistics_id(path: Path) -> str:
    """The id that a statistics file says it has; earlier versions say none, so of those the sums are read."""
    if not Path(path).is_file():  # reading a pipe waits for ever
        return load_statistics(path).id
    try:
        with safe_open(path, "pt") as file:
            said = parse_json((file.metadata() or {}).get("locum-statistics", "{}"))
        found = said.get("id")
    except (OSError, SafetensorError, ValueError, AttributeError):
        found = None
    return found if isinstance(found, str) else load_statistics(path).id


def _from_version_1(notes: dict[str, Any]) -> dict[str, Any]:
    """The notes of a file of version 1 as those of version 2."""
    words = dict(notes["provenance"])
    data = words.pop("data_fingerprint")
    search = words.pop("search", None)
    origin = {key: words.pop(key) for key in ("shape", "model_fingerprint", "tokenizer_fingerprint")}
    return {
        "domains": notes["domains"],
        "origin": origin | {"data_fingerprints": data if isinstance(data, list) else [data]},
        "tokens": words.pop("tokens"),
        "searched": None if search is None else {"name": search["method"], "options": search["options"]},
        "next_block": words.pop("next_block", None),
        "provenance": words,
    }
