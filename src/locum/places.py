"""Where the things are that an artefact names: a checkpoint's original, an adapter's base, a plan's statistics.

What a run writes goes to others, so it holds no paths: it names a thing by its last name and by its mark, a fingerprint
or id. The thing is found again beside what names it, or where it was last seen on this machine: that is noted in the
user's cache, a small file for each mark. Whatever is found must still have the mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import only_ours, own_folder
from .errors import LocumError
from .json_text import parse_json

FOLDER = "places"  # in the cache
MARK = re.compile(r"[0-9a-f]{8,64}")  # it may come from anybody's file, and is a file's name here
MOST_BYTES, MOST_PLACES = 2**14, 1000


def name_of(path: str | os.PathLike[str]) -> str:
    """The last name of a path: all that artefacts say of it."""
    return Path(os.path.abspath(path)).name or os.sep


def named_from(path: str | os.PathLike[str], folder: Path | None) -> str:
    """How a file in `folder` names a path: from there, where it lies below it; else by its last name."""
    if folder is not None and not Path(os.path.expanduser("~")).is_relative_to(os.path.abspath(folder)):
        with contextlib.suppress(ValueError):
            return str(Path(os.path.abspath(path)).relative_to(os.path.abspath(folder)))
    return name_of(path)


def bare_word(word: str) -> str:
    """A word of a command line without folders: "code=/home/me/a.txt@2" is "code=a.txt@2"."""
    option, path = re.findall(r"\A((?:[^/=]*=)?)(.*)", word.replace(os.sep, "/"), re.DOTALL)[0]
    return option + path.rstrip("/").rpartition("/")[2] if "/" in path else word


def without_folders(text: str) -> str:
    """A text in which absolute paths are their last names."""
    return re.sub(r"(?<![\w:/.~-])~?/(?:[^\s/'\",;:()]+/)*([^\s/'\",;:()]+)", r"\1", text)


def bare(value: Any) -> Any:
    """Provenance, or any other JSON, without folders: whatever a caller put into it, nothing absolute is written."""
    if isinstance(value, str):
        return name_of(value) if os.path.isabs(value) else without_folders(value)
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items()}
    return [bare(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Found:
    """Where a named thing is; or only what has its name, and is another or has changed; or neither."""

    place: Path | None = None
    other: Path | None = None


def find(named: str, mark: str | None, beside: Path, mark_of: Callable[[Path], Any]) -> Found:
    """What `named` means in a file or folder that lies in the folder `beside`. `mark_of` gives the mark of a place.

    Artefacts of earlier versions name whole paths, some of them without a mark: they are taken as they stand.
    """
    path = Path(named)
    if mark is None:
        return Found(path if named and path.exists() else None)
    tried = [path] if path.is_absolute() else []
    if path.name not in ("", ".."):
        tried.append(Path(os.path.abspath(beside)) / path.name)
    other = None
    for place in [*tried, *_last_seen(mark)]:
        if place.exists():
            with contextlib.suppress(LocumError, OSError):
                if mark_of(place) == mark:
                    return Found(place)
            other = other or place
    return Found(None, other)


def remember(mark: str, place: str | os.PathLike[str]) -> None:
    """Note where a thing is. Where there is no cache for it, nothing is noted."""
    with contextlib.suppress(OSError):
        folder = own_folder(FOLDER)
        handle, scratch = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump({"path": os.path.abspath(place)}, stream)
            os.replace(scratch, folder / mark)
        except BaseException:
            os.unlink(scratch)
            raise
        _forget_oldest(folder)


def _last_seen(mark: str) -> list[Path]:
    """The place that was noted for a mark, in a list; empty where there is none, or what is there is not by us."""
    if not MARK.fullmatch(mark):
        return []
    with contextlib.suppress(OSError, ValueError, LocumError, KeyError, TypeError):
        file = own_folder(FOLDER) / mark
        if only_ours(file) and file.stat().st_size <= MOST_BYTES:
            place = Path(parse_json(file.read_text())["path"])
            return [place] if place.is_absolute() else []
    return []


def _forget_oldest(folder: Path) -> None:
    files = list(folder.iterdir())
    if len(files) > MOST_PLACES:
        for file in sorted(files, key=lambda file: file.lstat().st_mtime)[: MOST_PLACES // 10]:
            file.unlink(missing_ok=True)
