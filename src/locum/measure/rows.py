"""Results on disk: one measured number per row, one row per line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import check_output, or_else_printed, write_text
from ..json_text import parse_json
from ..places import bare
from ..runs import reserved


@dataclass(frozen=True)
class Row:
    """One measured number, as results.jsonl holds it."""

    model: str
    plan: str | None
    metric: str
    domain: str
    value: float
    low: float | None  # 95% interval; None where there is one block, which says nothing about spread
    high: float | None
    n: int  # predicted tokens
    seed: int
    seconds: float  # of the whole run
    peak_bytes: int  # of the process, or of the accelerator's memory if the model is on one
    provenance: dict[str, Any]


# rows on disk


def write_rows(path: str | Path, rows: list[Row], append: bool = True) -> None:
    """Append rows to a JSONL file, or let it have these alone. It is replaced whole: a reader never sees half of them.

    Where that cannot be done, the OutputError has them: they may have taken hours.
    """
    lines = [json.dumps(bare(dataclasses.asdict(row))) for row in rows]
    with or_else_printed("\n".join(lines)):
        path = check_output(path, force=True)
        with reserved(path, wait=True):  # of two evaluations that end together, neither loses its rows
            if append and path.exists():
                read_rows(path)  # what another program has put there is no place for rows
            old = path.read_text(encoding="utf-8") if append and path.exists() else ""
            old += "\n" if old and not old.endswith("\n") else ""
            write_text(path, old + "".join(line + "\n" for line in lines))


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a results file. Raises DataError, naming the line, for anything that is not a row."""
    if Path(path).exists() and not Path(path).is_file():
        raise DataError(f"cannot read results {path}: it is no file; make them with: locum eval")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read results {path}: {error}; make them with: locum eval") from None
    try:
        return [_row(line, f"{path}, line {i + 1}") for i, line in enumerate(text.split("\n")) if line.strip()]
    except DataError:
        if "\n" in text.strip() and _is_json(text):
            raise DataError(
                f"{path} is one piece of JSON and no results, which have a row on each line; make them with: locum eval MODEL --data "
                f"... --out results.jsonl"
            ) from None
        raise


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except json.JSONDecodeError:
        return False
    return True


KINDS: dict[str, Any] = {
    "str": str,
    "str | None": str | None,
    "float": int | float,
    "float | None": int | float | None,
    "int": int,
    "dict[str, Any]": dict,
}


def _row(line: str, where: str) -> Row:
    try:
        data = parse_json(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); remove the line or measure again") from None
    fields = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    if not isinstance(data, dict) or set(data) != set(fields):
        found = ", ".join(sorted(data)) if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{where}: a result has the fields {', '.join(sorted(fields))}; found {found or 'none'}")
    for name, kind in fields.items():
        if not isinstance(data[name], KINDS[kind]) or isinstance(data[name], bool):
            raise DataError(f"{where}: {name!r} is {data[name]!r}, and not {kind}")
    return Row(**data)
