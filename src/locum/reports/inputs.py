"""What a report is made of: results rows, and the plans, statistics and recovery logs that they name or that are given.

A path in a row is looked for as it stands, then from the folder of its results file, then by ever shorter ends of it
from there: a folder of results can be moved or copied whole. A plan counts only if it is the one that the row names.
Rows may be anybody's, so what they name is read only where it lies beside them, in the folder of the results file or
below, and is no larger than such files are.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, LocumError
from ..json_text import parse_json
from ..measure.rows import Row, read_rows
from ..places import bare, name_of, named_from, without_folders
from ..plans.plan import Plan
from ..plans.plan_file import load_plan
from ..stats.statistics_file import load_statistics
from ..stats.sums import Statistics

MOST_BYTES = {"plan": 2**26, "recovery log": 2**28, "statistics": 2**32}  # of what is read because a row names it
CHECKPOINT_PARTS = {"plan_file": "plan.json", "recovery_log": "recovery.jsonl"}  # beside the weights of a checkpoint


@dataclass(frozen=True)
class RecoveryLog:
    name: str
    start: dict[str, Any]  # options and provenance of the run, by name
    training: tuple[dict[str, Any], ...]  # lines with "step" and "loss"
    validation: tuple[dict[str, Any], ...]  # lines with "step" and "validation_loss"
    kept_step: int | None = None  # whose state the run ended with


@dataclass
class Inputs:
    """Everything that was found, and what became of every file that was named: as the page says it, without folders."""

    rows: list[Row] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)  # by id, which is slow to compute; the others by file
    statistics: dict[str, Statistics] = field(default_factory=dict)
    logs: dict[str, RecoveryLog] = field(default_factory=dict)
    used: list[tuple[str, str]] = field(default_factory=list)  # kind, file
    missed: list[tuple[str, str, str]] = field(default_factory=list)  # kind, file, why


def read_inputs(
    results: Sequence[Path | str],
    plans: Sequence[Path | str] = (),
    statistics: Sequence[Path | str] = (),
    logs: Sequence[Path | str] = (),
) -> Inputs:
    """Read what is given, and whatever the rows name that still exists. Only given files may raise."""
    found = Inputs()
    sources = []
    for path in map(Path, results):
        rows = read_rows(path)
        found.rows += rows
        found.used.append(("results", name_of(path)))
        sources += [(row, path) for row in rows]
    if not found.rows and not statistics:
        files = ", ".join(str(path) for path in results) or "no file"
        raise DataError(
            f"no results rows in {files}; measure a model first: locum eval MODEL --data ... --out results.jsonl"
        )
    for path in map(Path, plans):
        _keep(found, "plan", path, load_plan(path))
    for path in map(Path, statistics):
        _keep(found, "statistics", path, load_statistics(path))
    for path in map(Path, logs):
        _keep(found, "recovery log", path, read_log(path))
    _discover(found, sources)
    return found


def read_log(path: Path) -> RecoveryLog:
    """A recovery log. A last line that an interrupted run left unfinished is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read recovery log {path}: {error}") from error
    entries = []
    for number, words in enumerate(lines, 1):
        try:
            entry = parse_json(words)
        except json.JSONDecodeError as error:
            if number == len(lines) and entries:
                break
            said = getattr(error, "msg", error)
            raise DataError(f"{path}, line {number}: not JSON ({said}); is this a recovery log?") from error
        if not isinstance(entry, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {type(entry).__name__}")
        entries.append(entry)
    start = _said_at_start(next((e for e in entries if e.get("event") == "start"), {}))
    lines_of = {
        key: tuple(e for e in entries if _finite(e, "step") and _finite(e, key)) for key in ("loss", "validation_loss")
    }
    kept = next((e["kept_step"] for e in reversed(entries) if isinstance(e.get("kept_step"), int)), None)
    return RecoveryLog(log_name(path), start, lines_of["loss"], lines_of["validation_loss"], kept)


def _said_at_start(line: dict[str, Any]) -> dict[str, Any]:
    """The facts of a log's first line by name. What identifies the run repeats its options, so each is said once."""
    parts = {key: value for key, value in line.items() if isinstance(value, dict)}
    made = parts.get("provenance", {})
    identity = made.get("identity")
    facts = {key: value for key, value in line.items() if key not in ("event", *parts)}
    facts |= parts.get("options", {}) | (identity if isinstance(identity, dict) else {})
    return facts | {key: value for key, value in made.items() if key != "identity"}


def log_name(path: Path) -> str:
    """The folder says which model a log belongs to: inside checkpoints all logs have one name."""
    return path.absolute().parent.name if path.name == CHECKPOINT_PARTS["recovery_log"] else path.stem


def _finite(entry: dict[str, Any], key: str) -> bool:
    value = entry.get(key)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- discovery ------------------------------------------------------------------------------------------------------


def _keep(found: Inputs, kind: str, path: Path, what: Any, beside: Path | None = None) -> None:
    shelf = {"plan": found.plans, "statistics": found.statistics, "recovery log": found.logs}[kind]
    key = what.id if kind == "plan" else os.path.realpath(path)
    if key not in shelf:
        shelf[key] = what
        found.used.append((kind, named_from(path, beside)))


def _discover(found: Inputs, sources: Iterable[tuple[Row, Path]]) -> None:
    readers = {"plan": load_plan, "statistics": load_statistics, "recovery log": read_log}
    read = functools.cache(lambda kind, path: readers[kind](path))  # many rows name the same file
    given = {kind for kind, _ in found.used}
    named = dict.fromkeys(
        (kind, name, sure, source, row.plan) for row, source in sources for kind, name, sure in _named(row)
    )
    for kind, name, sure, source, plan in named:
        if kind == "statistics" and kind in given:
            continue
        why = "not found beside the results"
        # all recovery logs are called the same, so the name alone would find another model's
        for path in _candidates(Path(name), source.parent, 2 if kind == "recovery log" else 1):
            if reason := _why_unread(kind, path, source.parent):
                why = f"found {named_from(path, source.parent)}, which {reason}"
                continue
            try:
                what = read(kind, path)
            except LocumError as error:
                why = f"cannot be used: {without_folders(str(error))}"
                continue
            if kind == "plan" and plan is not None and what.id != plan:
                why = f"found {named_from(path, source.parent)}, which is plan {what.id} and not {plan}"
                continue
            _keep(found, kind, path, what, source.parent)
            break
        else:
            if sure and (kind, bare(name), why) not in found.missed:
                found.missed.append((kind, bare(name), why))


def _why_unread(kind: str, path: Path, folder: Path) -> str:
    """Why a file that a row names is left alone, if so."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return "is outside the folder of the results, and is not read; put the two together"
    size = path.stat().st_size
    return f"has {size:,} bytes, too many for a {kind} that nobody asked for" if size > MOST_BYTES[kind] else ""


def _named(row: Row) -> Iterator[tuple[str, str, bool]]:
    """Kind and path of every file that a row names, and whether it said so itself (a checkpoint may lack parts)."""
    kinds = {"plan_file": "plan", "statistics_file": "statistics", "recovery_log": "recovery log"}
    for key, kind in kinds.items():
        if isinstance(name := row.provenance.get(key), str) and name:
            yield kind, name, True
    folder = row.provenance.get("checkpoint")
    if isinstance(folder, str) and folder:
        for key, part in CHECKPOINT_PARTS.items():
            if not row.provenance.get(key):
                yield kinds[key], str(Path(folder) / part), False


def _candidates(name: Path, folder: Path, least: int = 1) -> list[Path]:
    """Existing files that may be meant; ends of the path have at least `least` parts."""
    ends = [folder / Path(*name.parts[start:]) for start in range(1, len(name.parts) + 1 - least)]
    tried = [name, *ends] if name.is_absolute() else [folder / name, name, *ends]
    return [path for path in dict.fromkeys(tried) if path.is_file()]
