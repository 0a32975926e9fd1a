"""The user's cache: folders of Locum's own in it, which nobody else can write to. Nothing depends on what is in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def own_folder(name: str) -> Path:
    """A folder of the cache, made if need be. Raises OSError where it cannot be had for this user alone."""
    folder = _cache() / "locum" / name
    folder.mkdir(0o700, parents=True, exist_ok=True)
    if not only_ours(folder):
        raise PermissionError(
            f"others own {folder} or can write to it; remove it, or set XDG_CACHE_HOME to a cache of your own"
        )
    return folder


def _cache() -> Path:
    """The user's cache, by the XDG rules: a variable that is empty, or no absolute path, counts as not set."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME to a cache") from error


def only_ours(path: Path) -> bool:
    """Whether a file or folder is there, no link, and nobody but its owner, who runs this, can change it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
