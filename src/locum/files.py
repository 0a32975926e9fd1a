"""Files on disk: written whole or not at all, with their provenance inside."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import LocumError, OutputError
from .places import bare_word

NOTES = "locum.json"  # what Locum says of a checkpoint it made, beside the weights
LONGEST_NAME = 200  # bytes: file systems allow 255, and what stands beside an output for a while has a longer name
CHECKSUM = "checksum"  # its entry in the metadata of a safetensors file
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux

Mark = tuple[int, ...] | None  # what tells a file or folder from another one in its place; None: nothing is there
# Outputs of this run that nobody allowed to replace, and what was there.
_watched: ContextVar[dict[Path, Mark] | None] = ContextVar("watched", default=None)


def provenance(**more: Any) -> dict[str, Any]:
    """Who made an artefact: versions, machine, command and time, and whatever else the caller knows. No folders."""
    command = " ".join([Path(sys.argv[0]).name, *map(bare_word, sys.argv[1:])])
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }


def versions() -> dict[str, str]:
    """What the bits of an artefact depend on beside its inputs: the libraries that compute it, and Locum."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {**found, "locum": _own_version()}


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
    check_place(path)
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


def check_place(path: Path) -> None:
    """Refuse a path at which Locum cannot write, whatever is there and whatever is to be written."""
    name = os.fsencode(os.path.realpath(path))
    try:
        name.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = name.decode("utf-8", "backslashreplace")
        raise OutputError(
            f"output {shown} is not a name in UTF-8, and files beside it would name it; rename it"
        ) from error
    if (length := len(os.path.basename(name))) > LONGEST_NAME:
        raise OutputError(
            f"the name of output {path} has {length} bytes; allowed: {LONGEST_NAME}; choose a shorter one"
        )
    _check_folder(path)
    _check_replaceable(path)


def free_space(path: Path) -> int:
    """Bytes that are free where a path is to be written."""
    return shutil.disk_usage(existing_folder(path)).free


def check_room(path: Path, needed: int, begun: int = 0) -> None:
    """Refuse a disk that is too small for so many bytes at a path, `begun` of which are there, before they are made."""
    if needed > (free := free_space(path) + begun):
        raise OutputError(
            f"no space left for {path}: it takes {describe_size(needed)}, and {describe_size(free)} are free there; free some, or "
            f"choose another disk"
        )


def describe_size(count: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def existing_folder(path: Path) -> Path:
    """The nearest folder that exists above a path."""
    return next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())


def _check_folder(path: Path) -> None:
    """The nearest folder that exists above a path must be one that can be written to."""
    try:
        folder = existing_folder(path)
        if not folder.is_dir():
            raise OutputError(f"cannot write {path}: {folder} is a file, not a folder; choose another name")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from error


def _check_replaceable(path: Path) -> None:
    """A device or a pipe would be gone for all others, not written to."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(f"output {path} is a device, pipe or socket, which is never replaced; name a file")


@contextlib.contextmanager
def whole(path: Path, kind: str = "file", scratch: Path | None = None) -> Iterator[Path]:
    """A temporary neighbour of `path` to write into; it takes the name only when the block ends well.

    On any error or interrupt the neighbour is removed and whatever was at `path` stays. What a killed process left of
    its neighbour goes too. A link stays a link: what it leads to is written. A full disk is an OutputError. What another
    program has put at a watched path stays, and the result is kept beside it.

    A caller's own `scratch` folder beside the path, which it may have begun to fill, is the caller's to remove.
    """
    path, own = Path(os.path.realpath(path)), scratch is None
    scratch = scratch or path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        sweep(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            scratch.mkdir(exist_ok=not own)
        yield scratch
        _open_permissions(scratch)
        sync(scratch)
        _check_replaceable(path)
        _check_watched(scratch, path)
        _put(scratch, path)
        _note(path)
    except Exception as error:
        if _is_full(error):
            raise OutputError(f"no space left for {path}; nothing was kept; free some and run it again") from error
        raise
    finally:
        if own:
            _remove(scratch)


@contextlib.contextmanager
def step_towards(path: Path) -> Iterator[Path]:
    """A file that is only needed until `path` is written, beside it. What a killed process left goes when `path` is next written."""
    step = Path(os.path.realpath(path))
    step = step.with_name(f".{step.name}.step-{os.getpid()}")
    try:
        yield step
    finally:
        _remove(step)


@contextlib.contextmanager
def watched(path: str | Path) -> Iterator[None]:
    """Let `whole` replace, until the block ends, only what is at this output now, and what the run itself writes there."""
    real, marks = Path(os.path.realpath(path)), _watched.get() or {}
    if real in marks:  # by the stage around this one
        yield
        return
    before = _watched.set({**marks, real: _mark(real)})
    try:
        yield
    finally:
        _watched.reset(before)


def _mark(path: Path) -> Mark:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_mtime_ns


def _check_watched(scratch: Path, path: Path) -> None:
    """Work may have taken hours, so the result gets another name where its own is taken."""
    marks = _watched.get() or {}
    if path not in marks or _mark(path) in (None, marks[path]):
        return
    beside = next(place for place in _names_beside(path) if not place.exists())
    os.replace(scratch, beside)
    raise OutputError(
        f"another program has written {path} meanwhile, which is not replaced without --force; the result is {beside}"
    )


def _names_beside(path: Path) -> Iterator[Path]:
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    return (path.with_name(f"{stem}.{number}{suffix}") for number in itertools.count(2))


def _note(path: Path) -> None:
    marks = _watched.get() or {}
    if path in marks:
        marks[path] = _mark(path)


@contextlib.contextmanager
def or_else_printed(text: str) -> Iterator[None]:
    """Where what was measured cannot be written after all, the error has it as text, which the command line prints."""
    try:
        yield
    except (LocumError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        raise OutputError(f"{said}; what was measured is printed instead", unwritten=text) from error


def _is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full. Those of Rust libraries and of copied folders say so in words alone."""
    said = str(error)
    in_words = any(f"(os error {number})" in said or f"[Errno {number}]" in said for number in NO_SPACE)
    return getattr(error, "errno", None) in NO_SPACE or in_words


def _put(scratch: Path, path: Path) -> None:
    """Give a finished neighbour its name. A folder that has it changes places with the new one, or steps aside."""
    if not path.is_dir():
        os.replace(scratch, path)
    elif not _exchange(scratch, path):
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.replace(path, old)
        try:
            os.replace(scratch, path)
        except BaseException:
            os.replace(old, path)
            raise
        _remove(old)
    _sync_one(path.parent)


def _exchange(one: Path, two: Path) -> bool:
    """Let two paths change places in one step, so that both are there at any moment. False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    places = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two))
    return rename is not None and rename(*places, RENAME_EXCHANGE) == 0


def sweep(path: Path) -> None:
    """Remove what killed processes left of their neighbours of a path; the only copy of an output gets its name back."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(part|step|old)-(\d+)")
    with contextlib.suppress(OSError):  # a courtesy: what another user left is not in the way
        for left in sorted(path.parent.iterdir()):
            found = pattern.fullmatch(left.name)
            if found is None or _is_alive(int(found[2])):
                continue
            if found[1] == "old" and not path.exists():
                os.replace(left, path)
            else:
                _remove(left)


def _is_alive(process: int) -> bool:
    """Whether another process has this number. Our own, in a leftover, was that of one before: containers repeat them."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def sync(path: Path) -> None:
    """Have the content on the disk before the name: after a power cut, a name never stands for what was not written."""
    for place in [*path.rglob("*"), path]:
        _sync_one(place)


def _sync_one(place: Path) -> None:
    if place.is_symlink():
        return
    try:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not place.is_dir():  # some systems cannot do it for folders
            raise


def _open_permissions(path: Path) -> None:
    """safetensors writes files that only their owner may read; give them what any new file would have."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~umask)


def clear(path: Path) -> None:
    """Remove a file or folder, and what killed processes left of it, if there is any. Nobody ever finds half of a folder."""
    sweep(path)
    if path.is_dir() and not path.is_symlink():
        scrap = path.with_name(f".{path.name}.part-{os.getpid()}")
        os.replace(path, scrap)
        path = scrap
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def read_tensors(path: Path, but: Callable[[str], bool] = lambda name: False) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file, without those that `but` names, and its metadata. Raises SafetensorError, also where they
    are not those of its checksum, if it has one, and OSError in the system's words."""
    if path.exists() and not path.is_file():
        raise SafetensorError("it is no file")  # a pipe would be waited for
    with path.open("rb"):  # safetensors says of what may not be read that it is not there
        pass
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if not but(key)}  # noqa: SIM118
        notes = file.metadata() or {}
    said = notes.pop(CHECKSUM, None)
    if said is not None and said != checksum(tensors, notes):
        raise SafetensorError("numbers or notes have changed since they were written")
    return tensors, notes


def write_tensors(path: Path, tensors: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    """A safetensors file with a checksum, whole or not at all."""
    with whole(path) as scratch:
        save_file(dict(tensors), scratch, {**notes, CHECKSUM: checksum(tensors, notes)})


def checksum(tensors: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Of all bytes of tensors and of their names, and of notes."""
    found = zlib.crc32(json.dumps(dict(sorted(notes.items()))).encode())
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def fingerprint(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]
