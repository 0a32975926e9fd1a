"""What lies inside a checkpoint's folder: neither a link nor a name leads what is read or copied out of it.

A folder may come from anybody, and what is made of it may be published. In the cache of a hub, files of a snapshot are
links to its `blobs`, of the repository (../../blobs) or shared by all of the cache (../../../blobs): those belong to it.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Any

from ..errors import CheckpointError
from ..json_text import parse_json

DEEPEST = 100  # levels of lists and tables in a JSON file; real ones have a handful, and what copies them recurses
TEMPLATES = "additional_chat_templates"  # the one folder inside a checkpoint's that transformers reads


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, or one clear error."""
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}; copy or download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__} where a JSON object is needed; download it again")
    if _nests_deeper(data, DEEPEST):
        raise CheckpointError(f"{file} nests more than {DEEPEST} levels deep, as no such file does; download it again")
    return data


def _nests_deeper(data: Any, levels: int) -> bool:
    level = [data]
    for _ in range(levels):
        level = [x for item in level if isinstance(item, (dict, list)) for x in _items(item)]
    return bool(level)


def _items(item: dict[str, Any] | list[Any]) -> Any:
    return item.values() if isinstance(item, dict) else item


def _can_be_a_name(text: str) -> bool:
    """Whether the system could have a file of this name. JSON may hold zeros and half surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def check_links(folder: str | Path) -> None:
    """Refuse a checkpoint's folder with a link that leads out of it, among what is read or copied."""
    folder = Path(folder)
    for place in (folder, folder / TEMPLATES):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if entry.is_symlink() and entry.exists() and (not entry.is_dir() or entry.name == TEMPLATES):
                check_link(entry, folder)


def check_link(file: Path, folder: Path) -> None:
    """Refuse a file of a checkpoint's folder that really lies elsewhere."""
    if leads_out(file, folder):
        raise CheckpointError(
            f"{file} leads out of the checkpoint's folder, to {os.path.realpath(file)}, and is not followed; put a copy of the "
            f"file there, or remove the link"
        )


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file of a folder really lies elsewhere; a hub cache's own blobs do not."""
    real, home = (Path(os.path.realpath(path)) for path in (file, folder))  # a link to itself is where it is
    own = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        own += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    return not any(real.is_relative_to(place) for place in own)


def named_file(folder: Path, name: object, where: str) -> Path:
    """A file of the folder that one of its files names. `where` says which, for the error."""
    parts = PurePath(name).parts if isinstance(name, str) and _can_be_a_name(name) else ()
    if not parts or PurePath(*parts).is_absolute() or ".." in parts:
        raise CheckpointError(
            f"{where} names the file {name!r}; expected one in the same folder: names that lead elsewhere are not followed"
        )
    check_link(folder / name, folder)
    return folder / name
