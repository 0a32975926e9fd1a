"""What an ending says: a clear error, an acceptance and whether of the same result, or a fault and where it is."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .damages import NotHere
from .process import HANG, MEMORY, Ending
from .tensor_damages import read_tensors

ERROR, SAME, OTHER, FAILED = "error", "same", "other", "failed checks"
UNCLEAR, TRACEBACK, CRASH = "unclear", "traceback", "crash"
RESULTS = (ERROR, SAME, OTHER, FAILED, UNCLEAR, TRACEBACK, CRASH, MEMORY, HANG)
FAULTS = (UNCLEAR, TRACEBACK, CRASH, MEMORY, HANG)
NO_MEMORY = re.compile(
    r"MemoryError|bad_alloc|can't allocate memory|cannot allocate memory|memory allocation of \d+", re.I
)
LOCUM = str(Path(find_spec("locum").origin).parent)
STACK, TRACE = "Current thread", "Traceback (most recent call last)"  # heads, by faulthandler and by Python
FRAME = re.compile(r'File "([^"]+)", line (\d+),? in (\S+)')
TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?Z?( UTC)?")

Snapshot = dict[str, tuple[int, int, int]]  # path: kind of file, size, time of the last change


@dataclass(frozen=True)
class Answer:
    """One of RESULTS; of a fault, the place in Locum and what was raised or said last."""

    result: str
    where: str = ""
    said: str = ""


TOLD = "the statistics of an earlier run are used"  # by compress: the inputs share a cache


def answer(ending: Ending, command: str) -> Answer:
    """What an ending says, but for the results of what was accepted: those are SAME until they are compared."""
    lines = [line for line in ending.stderr.splitlines() if line.strip() and not line.startswith(TOLD)]
    said = _short(lines[-1]) if lines else ""
    if ending.stopped:
        said = f"after {ending.cpu_seconds:.0f} s of computing, with {ending.peak / 2**30:.1f} GiB"
        return Answer(ending.stopped, _place(ending.stderr, STACK), said)
    if ending.code not in (0, 2) and NO_MEMORY.search(said):
        return Answer(MEMORY, _place(ending.stderr), said)
    if TRACE in ending.stderr:
        return Answer(TRACEBACK, _place(ending.stderr), _raised(lines))
    if ending.code < 0:
        return Answer(CRASH, f"signal {-ending.code}", said)
    if ending.code == 0:
        return Answer(SAME, said=said)
    if ending.code == 1 and command == "verify":
        return Answer(FAILED)
    if ending.code == 2 and len(lines) == 1 and lines[0].startswith("locum"):
        return Answer(ERROR, said=_short(ending.stderr.strip(), 400))
    return Answer(UNCLEAR, f"code {ending.code}, {len(lines)} lines", " | ".join(map(_short, lines[-3:])))


def _place(stderr: str, head: str = TRACE) -> str:
    """The innermost frame of Locum in the last stack with this head, as file:line in function; else the innermost of all."""
    frames = FRAME.findall(stderr.rpartition(head)[2])
    ours = [frame for frame in frames if frame[0].startswith(LOCUM)] or frames
    if not ours:
        return ""
    file, line, function = ours[0 if head == STACK else -1]  # faulthandler's begins with the innermost
    return f"{file.removeprefix(LOCUM).lstrip('/')}:{line} in {function}"


def _raised(lines: list[str]) -> str:
    """The line that says what was raised: the last that begins like a class of errors."""
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Warning|Failure|Exit)\b", line)]
    return _short((named or lines)[-1])


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


# --- what a command made ----------------------------------------------------------------------------------------------


def snapshot(place: Path) -> Snapshot:
    """What is in a folder, without reading it."""
    found = {}
    for path in place.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(place))] = (about.st_mode, about.st_size, about.st_mtime_ns)
    return found


def made_in(place: Path, before: Snapshot) -> list[str]:
    """What is new or changed since a snapshot; of a new folder, its files."""
    now = snapshot(place)
    return sorted(name for name, about in now.items() if before.get(name) != about and not stat.S_ISDIR(about[0]))


def fields(place: Path, made: list[str], stdout: str, arguments: tuple[str, ...]) -> dict[str, str]:
    """Everything that a command printed and wrote, field by field: what two runs of one command are compared by.

    Places, times and the command line itself, of which provenance tells, have words in their stead.
    """
    found = dict(_text_fields("stdout", stdout))
    for name in made:
        path = place / name
        if path.is_symlink() or not path.is_file():
            found[name] = "not a file"
        elif tensors := _tensor_fields(path):
            found |= {f"{name} {field}": value for field, value in tensors.items()}
        else:
            found |= dict(_text_fields(name, path.read_bytes().decode("utf-8", errors="replace")))
    typed = json.dumps(" ".join(["locum", *arguments]))[1:-1]
    return {
        field: TIME.sub("TIME", value.replace(str(place), "PLACE").replace(typed, "COMMAND"))
        for field, value in found.items()
    }


def differing(fields: dict[str, str], undamaged: dict[str, str], volatile: set[str]) -> list[str]:
    """The fields that differ, with both values, but for the volatile ones: those that differ between undamaged runs."""
    names = sorted(name for name in {*fields, *undamaged} - volatile if fields.get(name) != undamaged.get(name))
    return [
        f"{name}: {_short(undamaged.get(name, 'absent'), 60)} -> {_short(fields.get(name, 'absent'), 60)}"
        for name in names
    ]


def _tensor_fields(path: Path) -> dict[str, str]:
    if path.suffix not in (".safetensors", ".partial", ".search", ".answers", ".calibrated"):
        return {}
    try:
        tensors, metadata = read_tensors(path)
    except NotHere:
        return {}
    found = {
        name: f"{dtype} {shape} {hashlib.sha256(data).hexdigest()[:12]}"
        for name, (dtype, shape, data) in tensors.items()
    }
    for key, value in (metadata or {}).items():
        found |= dict(_text_fields(key, value))
    return found


def _text_fields(name: str, text: str) -> Iterator[tuple[str, str]]:
    """The leaves of JSON, of each line of JSON lines; the lines of any other text."""
    try:
        yield from leaves(name, json.loads(text))
        return
    except (ValueError, RecursionError):
        pass
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield from leaves(f"{name}:{number}", json.loads(line))
        except (ValueError, RecursionError):
            yield f"{name}:{number}", line


def leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every single value in JSON data, by where it is, as text."""
    if value and isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(f"{name}.{key}", below)
    elif value and isinstance(value, list):
        for index, below in enumerate(value):
            yield from leaves(f"{name}[{index}]", below)
    else:
        yield name, json.dumps(value)
