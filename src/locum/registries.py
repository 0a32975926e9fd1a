"""Everything that is registered, by kind: what `locum list` and `locum show` say, read from the registered things alone."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from .arguments import in_declared_forms
from .budgets.budget import BUDGETS
from .criteria.criterion import CRITERIA
from .engines.engines import ENGINES
from .errors import OptionError, unknown
from .experts.parts.part import PARTS
from .experts.policies.policy import POLICIES
from .exports.target import TARGETS
from .formats.format import FORMATS
from .methods import METHODS
from .options import option_fields
from .registry import Registry
from .stages.options import Help
from .stats.sums import STATISTICS
from .training.ways import WAYS

LABEL = re.compile(r"([A-Z][a-z]+):\s+(.*)")  # the first line of a labelled paragraph, such as "Needs:    count"


@dataclass(frozen=True)
class Kind:
    """One kind of registered things: its registry, and where a thing keeps its docstring and its facts."""

    registry: Registry[Any]
    documented: Callable[[Any], Any] = lambda thing: thing
    facts: Callable[[Any], dict[str, Any]] = lambda thing: {}


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


KINDS: Mapping[str, Kind] = {
    "methods": Kind(
        METHODS, facts=lambda cls: {"paper": cls.paper, "saves": cls.saves, "statistics": _once(cls().needs())}
    ),
    "criteria": Kind(
        CRITERIA,
        documented=lambda item: item.score,
        facts=lambda item: {"paper": item.paper, "statistics": _once(item.needs)},
    ),
    "budgets": Kind(
        BUDGETS,
        documented=lambda item: item.counts,
        facts=lambda item: {"paper": item.paper, "statistics": _once(item.needs)},
    ),
    "statistics": Kind(
        STATISTICS, documented=lambda item: item.increment, facts=lambda item: {"axes": item.axes or "a single number"}
    ),
    "ways": Kind(WAYS, facts=lambda cls: {"paper": cls.source, "learning_rate": cls.learning_rate}),
    "parts": Kind(PARTS),
    "policies": Kind(POLICIES),
    "exports": Kind(TARGETS),
    "formats": Kind(FORMATS, documented=type),
    "engines": Kind(ENGINES, documented=type),
}


@in_declared_forms
def catalogue(
    kind: Annotated[str | None, Help(f"{', '.join(KINDS)}; default: all of them")] = None,
) -> dict[str, dict[str, Any]]:
    """What is registered, other packages' included: names by kind, or one kind with a line for each name."""
    if kind is not None and kind not in KINDS:
        raise OptionError(unknown("kind", kind, KINDS))
    kinds = KINDS if kind is None else [kind]
    return {each: {name: describe(each, name) for name in KINDS[each].registry} for each in kinds}


@in_declared_forms
def show(name: str) -> list[dict[str, Any]]:
    """All that is known of a name that is registered: formula, needs, cost, paper, options; of every kind that has it."""
    holders = [kind for kind, item in KINDS.items() if name in item.registry]
    if not holders:
        raise OptionError(unknown("name", name, {known for item in KINDS.values() for known in item.registry}))
    return [describe(kind, name) for kind in holders]


def describe(kind: str, name: str) -> dict[str, Any]:
    """What a registered thing says of itself: summary, formula and labelled notes of its docstring, facts, options.

    `statistics` are those that it reads with its default options.
    """
    held = KINDS[kind]
    thing = held.registry[name]
    said = {"kind": held.registry.kind, "name": name, **read_docstring(held.documented(thing)), **held.facts(thing)}
    return said | {"options": {field.name: _option(field) for field in option_fields(thing)}}


def _option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    about = {"default": field.default, "help": field.metadata["help"]}
    choices = field.metadata.get("choices", ())
    return about | ({"choices": list(choices)} if choices else {})


def read_docstring(thing: Any) -> dict[str, Any]:
    """Its first paragraph as `summary`, its labelled paragraphs as `notes`, and what is between them as `formula`."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    first = next((i for i, line in enumerate(lines) if LABEL.fullmatch(line)), len(lines))
    summary, _, formula = "\n".join(lines[:first]).partition("\n\n")
    notes: dict[str, str] = {}
    for line in lines[first:]:
        if found := LABEL.fullmatch(line):
            label = found[1].lower()
            notes[label] = found[2]
        else:
            notes[label] = f"{notes[label]} {line.strip()}".strip()
    return {"summary": " ".join(summary.split()), "formula": formula.strip("\n"), "notes": notes}
