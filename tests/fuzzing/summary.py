"""Tables of a campaign: results by kind of input, faults by their cause, and what was accepted with another result."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from .answers import OTHER, RESULTS

Row = dict[str, Any]
SHOWN = 12  # numbers of inputs in a line of the tables


def summary(rows: list[Row]) -> str:
    """All three tables, as Markdown."""
    parts = ["## Results by kind of input", _results(rows)]
    tried = Counter(row["sources"] for row in rows)
    if len(tried) > 1:
        parts.append(
            "Sources changed on the way: " + ", ".join(f"{n} inputs by {name}" for name, n in tried.items()) + "."
        )
    if faults := [row for row in rows if row["fault"]]:
        parts += ["## Faults by cause", _causes(faults)]
    if others := [row for row in rows if row["result"] == OTHER]:
        parts += ["## Accepted, with another result: to be judged", _accepted(others)]
    return "\n\n".join(parts) + "\n"


def _table(heads: list[str], lines: list[list[Any]]) -> str:
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in cells)


def _cell(value: Any) -> str:
    return ascii(str(value))[1:-1].replace("|", "\\|").replace("`", "'")


def counts(rows: list[Row]) -> dict[str, Counter[str]]:
    """How many inputs of every kind, and of all, had which result; "all" comes last."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in sorted(rows, key=lambda row: row["kind"]):
        found[row["kind"]][row["result"]] += 1
    return {**found, "all": Counter(row["result"] for row in rows)}


def _results(rows: list[Row]) -> str:
    lines = [[kind, n.total(), *(n[result] for result in RESULTS)] for kind, n in counts(rows).items()]
    return _table(["kind", "inputs", *RESULTS], lines)


def _causes(rows: list[Row]) -> str:
    causes: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        causes[row["result"], row["where"], row["said"].partition(":")[0]].append(row)
    lines = []
    for (result, where, _), alike in sorted(causes.items(), key=lambda item: (-len(item[1]), item[0])):
        first = alike[0]
        lines.append(
            [
                result,
                where,
                first["said"],
                len(alike),
                _numbers(alike),
                f"{first['command'][:120]}; {first['damaged'][:120]}",
            ]
        )
    return _table(["result", "where", "says", "inputs", "numbers", "first"], lines)


def _accepted(rows: list[Row]) -> str:
    lines = [
        [row["number"], row["kind"], row["damaged"][:160], row["command"][:120], row["differs"][0][:160]]
        for row in rows
    ]
    return _table(["number", "kind", "damage", "command", "first field that differs"], lines)


def _numbers(rows: list[Row]) -> str:
    numbers = [str(row["number"]) for row in rows]
    return ", ".join(numbers[:SHOWN]) + (" ..." if len(numbers) > SHOWN else "")
