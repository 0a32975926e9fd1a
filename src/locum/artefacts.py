"""Files on disk: written whole or not at all, with their provenance inside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import OutputError, StatisticsError
from .plan import Plan
from .statistics import Statistics

STATISTICS_VERSION = "1"
NOTES = "locum.json"  # what Locum says of a checkpoint it made, beside the weights


def provenance(**more: Any) -> dict[str, Any]:
    """Who made an artefact: versions, machine, command and time, and whatever else the caller knows."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    versions["locum"] = _own_version()
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }


def _own_version() -> str:
    try:
        return metadata.version("locum")
    except metadata.PackageNotFoundError:  # a source tree on the path, not installed
        return "source"


def check_output(path: str | Path, force: bool, kind: str = "file") -> Path:
    """Refuse an output that exists (without `force`) or cannot be written, before any work is done."""
    path = Path(path)
    if kind == "folder" and path.is_dir() and not any(path.iterdir()):
        pass
    elif path.exists() and not force:
        raise OutputError(f"output {path} exists already; choose another name or pass --force to replace it")
    elif path.exists() and (kind == "folder") != path.is_dir():
        raise OutputError(
            f"output {path} is a {'folder' if path.is_dir() else 'file'}, a {kind} is to be written there"
        )
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {parent}: {error.strerror}; choose a folder you may write to") from error
    return path


@contextlib.contextmanager
def whole(path: Path, kind: str = "file") -> Iterator[Path]:
    """A temporary neighbour of `path` to write into; it takes the name only when the block ends well.

    On any error or interrupt the neighbour is removed and whatever was at `path` stays. A full disk is an OutputError.
    """
    scratch = path.with_name(f".{path.name}.part-{os.getpid()}")
    _remove(scratch)
    if kind == "folder":
        scratch.mkdir(parents=True)
    try:
        yield scratch
        _open_permissions(scratch)
        if kind == "folder" and path.exists():
            _remove(path)
        os.replace(scratch, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left for {path}; nothing was kept; free some space and run it again"
            ) from error
        raise
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OutputError(
                f"no space left for {path}; nothing was kept; free some space and run it again"
            ) from error
        raise
    finally:
        _remove(scratch)


def _open_permissions(path: Path) -> None:
    """safetensors writes files that only their owner may read; give them what any new file would have."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~umask)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def write_text(path: Path, text: str) -> None:
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def save_plan(plan: Plan, path: Path) -> None:
    write_text(path, plan.dumps())


def load_plan(path: str | Path) -> Plan:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read plan {path}: {error}") from error
    return Plan.loads(text, f"plan {path}")


def save_statistics(statistics: Statistics, path: Path) -> None:
    """One safetensors file: tensors "layer|statistic", everything else as JSON in the metadata."""
    tensors = {
        f"{layer}|{name}": tensor.contiguous()
        for layer, named in statistics.layers.items()
        for name, tensor in named.items()
    }
    notes = {"domains": list(statistics.domains), "provenance": statistics.provenance}
    with whole(path) as scratch:
        save_file(tensors, scratch, {"locum-statistics": STATISTICS_VERSION, "notes": json.dumps(notes)})


def load_statistics(path: str | Path) -> Statistics:
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
        raise StatisticsError(f"statistics {path} cannot be read ({error}); calibrate again") from error
    if header.get("locum-statistics") != STATISTICS_VERSION:
        raise StatisticsError(
            f"{path} is not a Locum statistics file of version {STATISTICS_VERSION} "
            f"(found {header.get('locum-statistics')!r}); make one with: locum calibrate"
        )
    notes = json.loads(header["notes"])
    layers: dict[str, dict[str, Any]] = {layer["name"]: {} for layer in notes["provenance"]["shape"]["layers"]}
    for key, tensor in tensors.items():
        layer, _, name = key.partition("|")
        layers.setdefault(layer, {})[name] = tensor
    return Statistics(tuple(notes["domains"]), layers, notes["provenance"])


def fingerprint(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]
