"""Which options let a method meet a target that it misses, for the message that says so: only what it has, and what works."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import LocumError
from ..options import option_fields
from . import Method

# By an option's name: what to give, and the value with which that goes furthest; None for the lowest that is allowed.
REMOVE_MORE: Mapping[str, tuple[str, Any]] = {
    "rank": ("a lower --rank", None),
    "bases": ("fewer --bases", None),
    "floor": ("a lower --floor", None),
    "keep": ("a lower --keep", None),
    "lower_top_k": ("--lower-top-k", True),
    "protect": ("--no-protect", False),
    "most": ("a higher --most", 0.95),
    "pruned": ("a higher --pruned", 0.95),
}
REMOVE_LESS: Mapping[str, tuple[str, Any]] = {
    "budget": ("--budget uniform", "uniform"),
    "pruned": ("a lower --pruned", 0.0),
}


def levers(chosen: Method, known: Mapping[str, tuple[str, Any]], meet: Callable[[Method], Any]) -> list[str]:
    """What to give, each alone, of the options that are known. `meet` plans with another method, or raises an error of Locum's.

    A method that reads weights is not tried, as that may take as long as the work itself; what a search reads cannot be.
    """
    fields, found = {field.name: field for field in option_fields(chosen)}, []
    for name, (words, furthest) in known.items():
        if name not in fields:
            continue
        value = fields[name].metadata["at_least"] if furthest is None else furthest
        if getattr(chosen, name) == value:
            continue
        if name in getattr(chosen, "searched_with", ()):
            found.append(f"search again with {words}")
        elif chosen.reads_weights or _meets(dataclasses.replace(chosen, **{name: value}), meet):
            found.append(f"give {words}")
    return found


def _meets(other: Method, meet: Callable[[Method], Any]) -> bool:
    try:
        meet(other)
    except LocumError:
        return False
    return True
