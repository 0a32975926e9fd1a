"""Files on disk: written whole or not at all, with their provenance inside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import OutputError

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


def check_output(path: str | Path, force: bool, kind: str = "file", inputs: Iterable[Any] = ()) -> Path:
    """Refuse an output that exists (without `force`) or cannot be written, before any work is done.

    Never replaced, whatever `force` says: what is being read (`inputs`), the current folder, folders not by Locum.
    """
    path = Path(path)
    _check_folder(path)
    for source in [Path.cwd(), *(s for s in inputs if isinstance(s, (str, Path)))]:
        if path.exists() and Path(source).resolve().is_relative_to(path.resolve()):
            raise OutputError(f"output {path} would replace {source}, which is in use; choose another name")
    if path.exists() and (kind == "folder") != path.is_dir():
        found = "folder" if path.is_dir() else "file"
        raise OutputError(f"output {path} is a {found}, and a {kind} is to be written there; choose another name")
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not force:
        raise OutputError(f"output {path} exists already; choose another name or pass --force to replace it")
    if path.is_dir() and not is_empty and not (path / NOTES).is_file():
        raise OutputError(f"output {path} was not made by Locum (it has no {NOTES}); remove it, or choose another name")
    if os.path.ismount(path):
        raise OutputError(f"output {path} is a mount point, which cannot be replaced; name a folder inside it")
    return path


def _check_folder(path: Path) -> None:
    """The nearest folder that exists above a path must be one that can be written to."""
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise OutputError(f"cannot write {path}: {folder} is a file, not a folder; choose another name")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from error


@contextlib.contextmanager
def whole(path: Path, kind: str = "file") -> Iterator[Path]:
    """A temporary neighbour of `path` to write into; it takes the name only when the block ends well.

    On any error or interrupt the neighbour is removed and whatever was at `path` stays. A full disk is an OutputError.
    """
    scratch = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        _remove(scratch)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            scratch.mkdir()
        yield scratch
        _open_permissions(scratch)
        _put(scratch, path)
    except Exception as error:
        if _is_full(error):
            raise OutputError(f"no space left for {path}; nothing was kept; free some and run it again") from error
        raise
    finally:
        _remove(scratch)


def _is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full. Those of Rust libraries say so in words alone."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)


def _put(scratch: Path, path: Path) -> None:
    """Give a finished neighbour its name. A folder in its place goes only when the new one is there."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.is_dir():
        os.replace(path, old)
    try:
        os.replace(scratch, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    _remove(old)


def _open_permissions(path: Path) -> None:
    """safetensors writes files that only their owner may read; give them what any new file would have."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~umask)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def fingerprint(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]
