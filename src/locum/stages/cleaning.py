"""`clean`: what killed runs left beside outputs is found, and removed for the outputs that are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import in_declared_forms
from ..errors import OutputError
from ..files import clear
from ..runs import RANK, STATES, asides_of, clear_states, reserved

# Names beside an output: a state, nested or not; a half-written one; one that was set aside; a lock.
_STATE = "|".join([*map(re.escape, STATES), RANK.pattern.removeprefix(r"\.")])
LEFT = re.compile(rf"\.+(?P<out>.+?)((\.({_STATE}))+(\.(part|old)-\d+|\.aside(-\d+)?)*|\.(part|old)-\d+|\.lock)")


@in_declared_forms
def clean(outputs: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Remove what killed and interrupted runs left beside these outputs: what was being written, and states from which the
    same command would go on. Without a name, what there is in the current folder is listed, and nothing is removed.
    """
    if not outputs:
        return [_row(path, found["out"], False) for path, found in _found(Path()) if not path.name.endswith(".lock")]
    for out in outputs:
        if out.name in ("", ".."):
            raise OutputError(
                f"{str(out)!r} is a folder's place and no output's name; name what a run writes, such as {out / 'small'}"
            )
    rows = []
    for out in outputs:
        mine = [path for path, found in _found(out.parent) if found["out"] == out.name]
        rows += [_row(path, out.name, True) for path in mine if not path.name.endswith(".lock")]
        with reserved(out):  # which takes away what was half-written, and the lock
            asides = asides_of(out)
            clear_states(out)
            for aside in asides:
                clear(aside)
    return rows


def _found(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    matches = ((path, LEFT.fullmatch(path.name)) for path in sorted(folder.glob(".*")))
    return [(path, found) for path, found in matches if found]


def _row(path: Path, out: str, removed: bool) -> dict[str, Any]:
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.lstat().st_size for file in files if not file.is_dir())
    return {"path": str(path), "output": out, "bytes": size, "removed": removed}
