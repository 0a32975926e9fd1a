"""Two outputs of one command compared byte for byte; where a file differs, field by field, with what may differ left out.

What says when, how fast or how a command ran differs between any two runs: LEFT_OUT names it, and nothing else may differ.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.answers import TIME, leaves
from fuzzing.damages import NotHere
from fuzzing.tensor_damages import read_tensors

FORCED = "--force in the command"
SPENT = re.compile(r"'(seconds|peak_bytes|layer_activation_bytes)': [\d.]+")  # in the text of a card
ESCAPED = re.compile(r"\\+_")  # as Markdown has it, and that as a string of JSON
LEFT_OUT = {
    "time": "the date in provenance, also as text of a card or a page",
    "seconds": "how long a training, step or measurement took",
    "peak_bytes": "memory that it took",
    "layer_activation_bytes": "memory that a layer took in the first step of a process, whichever that was",
    "checksum": "of a file's numbers and notes, the date among them; those are compared themselves",
    FORCED: "where the command that provenance tells had it",
}
RESUMED = "resume"  # the event of a line of recovery.jsonl that a run which goes on adds


@dataclass
class Difference:
    """What differs between two outputs: fields that may not, and names of those that were left out."""

    wrong: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)


def compare(ours: Path, theirs: Path) -> Difference:
    """What differs between two files, or between two folders."""
    found = Difference()
    names = sorted({*_files(ours), *_files(theirs)})
    for name in names:
        one, two = ours / name, theirs / name
        if not (one.is_file() and two.is_file()):
            found.wrong.append(f"{name or ours.name}: {'absent' if two.is_file() else 'too many'}")
        elif one.read_bytes() != two.read_bytes():
            _compare_fields(name or ours.name, _fields(one), _fields(two), found)
    return found


def _files(place: Path) -> list[str]:
    if not place.is_dir():
        return [""] if place.exists() else []
    return [str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir()]


def _compare_fields(name: str, ours: dict[str, Any], theirs: dict[str, Any], found: Difference) -> None:
    differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if not differing:
        found.wrong.append(f"{name}: the bytes differ and no field does")
    for key in differing:
        values = [fields.get(key) for fields in (ours, theirs)]
        if (last := key.rpartition(".")[2]) in LEFT_OUT:
            found.left_out.add(last)
        elif None not in values and len(plain := {_without(str(value)) for value in values}) == 1:
            (same,) = plain
            found.left_out |= {word for word in LEFT_OUT if f"<{word}>" in same} or {FORCED}
        else:
            found.wrong.append(f"{name} {key}: {str(values[0])[:80]} instead of {str(values[1])[:80]}")


def _without(text: str) -> str:
    """Text, or a command of provenance, without dates, --force, and what it took."""
    plain = TIME.sub("<time>", ESCAPED.sub("_", text.replace(" --force", "")))
    return SPENT.sub(r"<\1>", plain)


def _fields(path: Path) -> dict[str, Any]:
    try:
        tensors, metadata = read_tensors(path)
        found = {f"tensor {name}": value for name, value in tensors.items()}
        for key, value in (metadata or {}).items():
            found |= dict(leaves(key, _json(value)))
        return found
    except NotHere:
        pass
    text = path.read_bytes().decode("utf-8", errors="backslashreplace")
    if path.suffix == ".json":
        return dict(leaves("", _json(text)))
    rows = [_json(line) for line in text.splitlines()]
    rows = [row for row in rows if not (isinstance(row, dict) and row.get("event") == RESUMED)]
    return dict(leaf for number, row in enumerate(rows, 1) for leaf in leaves(f"line {number}", row))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
