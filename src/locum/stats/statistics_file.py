"""Statistics files on disk: one safetensors file, notes in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import StatisticsError
from ..files import whole
from .sums import Statistics

STATISTICS_VERSION = 1


def save_statistics(statistics: Statistics, path: Path) -> None:
    """One safetensors file: tensors "layer|statistic", everything else as JSON in the metadata."""
    tensors = {
        f"{layer}|{name}": tensor.contiguous()
        for layer, named in statistics.layers.items()
        for name, tensor in named.items()
    }
    notes = {
        "format_version": STATISTICS_VERSION,
        "domains": list(statistics.domains),
        "provenance": statistics.provenance,
    }
    with whole(path) as scratch:  # one entry of metadata: safetensors writes several in a random order
        save_file(tensors, scratch, {"locum-statistics": json.dumps(notes)})


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file. Raises StatisticsError, naming the file, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise StatisticsError(
            f"no statistics file at {path}; make one with: locum calibrate MODEL --data ... --out {path}"
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise StatisticsError(
            f"{path} is not a statistics file, or is damaged ({error}); make one with: locum calibrate"
        ) from error
    try:
        notes = json.loads(header.get("locum-statistics", "{}"))
        if notes.get("format_version") != STATISTICS_VERSION:
            raise StatisticsError(
                f"{path} is not a Locum statistics file of version {STATISTICS_VERSION} "
                f"(found {notes.get('format_version')!r}); make one with: locum calibrate"
            )
        layers: dict[str, dict[str, Any]] = {layer["name"]: {} for layer in notes["provenance"]["shape"]["layers"]}
        domains, origin = tuple(notes["domains"]), notes["provenance"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StatisticsError(f"statistics {path} have damaged notes ({error!r}); calibrate again") from error
    for key, tensor in tensors.items():
        layer, _, name = key.partition("|")
        layers.setdefault(layer, {})[name] = tensor
    return Statistics(domains, layers, origin)
