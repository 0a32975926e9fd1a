"""Checking what a plan's JSON holds: entries that are there, once, and of their type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import PlanError, unknown
from .layer_plan import Base, Slot

KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object {...}",
    list: "a list [...]",
}
BASE_ENTRIES = {"experts": list, "weights": list, "align": bool, "merge": str}


def once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """An object of a JSON file. Raises PlanError for an entry that is there twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{where}: entry {name!r} is there twice in {pairs!r:.120}; keep one of the two")
    return data


def checked(data: Any, entries: dict[str, type], required: int, where: str) -> dict[str, Any]:
    """`data`, an object that has the first `required` of these entries, maybe the others, each of its type."""
    if not isinstance(data, dict):
        raise PlanError(f"{where} is {data!r:.60}; it must be {KINDS[dict]}")
    for name in list(entries)[:required]:
        if name not in data:
            raise PlanError(f"{where} lacks the entry {name!r} ({KINDS[entries[name]]})")
    for name, value in data.items():
        if name not in entries:
            raise PlanError(f"{where}: {unknown('entry', name, entries)}")
        if type(value) is not entries[name] and not (entries[name] is float and type(value) is int):
            raise PlanError(f"{where}: {name!r} is {value!r:.60}; it must be {KINDS[entries[name]]}")
    return data


def by_expert(entries: list[Any], where: str, read: Callable[[dict[str, Any], str], Slot]) -> tuple[Slot, ...]:
    """Slots in the order of the experts, from lines in any order. Every expert has one line."""
    slots: dict[int, Slot] = {}
    for line, entry in enumerate(entries):
        slot = read(entry, f"{where}, line {line} of the experts")
        expert = entry["expert"]
        if expert < 0:
            raise PlanError(f"{where}, expert {expert}: experts are numbered from 0")
        if expert in slots:
            raise PlanError(f"{where}, expert {expert} is listed twice; keep one of the two lines")
        slots[expert] = slot
    for e in range(len(slots)):
        if e not in slots:
            raise PlanError(f"{where}: expert {e} is missing; every expert needs a line")
    return tuple(slots[e] for e in range(len(slots)))


def bases_from_json(data: Sequence[Any], where: str) -> tuple[Base, ...]:
    bases = []
    for b, entry in enumerate(data):
        given = checked(entry, BASE_ENTRIES, 2, f"{where}, base {b}")
        bases.append(Base(**given | {key: tuple(given[key]) for key in ("experts", "weights")}))
    return tuple(bases)
