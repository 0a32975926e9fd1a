"""The numbers of decoder layers in names, where some of them leave a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

NUMBERED = re.compile(r"(.*?\.)(\d+)(\..+)")  # what comes before a decoder layer's number, that, and what is inside it


@dataclass(frozen=True)
class Numbering:
    """Of names that begin with `prefix` and a number, the layers with these numbers are `gone`, and later ones count without them."""

    prefix: str = ""
    gone: frozenset[int] = frozenset()

    @classmethod
    def without(cls, names: Iterable[str]) -> Numbering:
        """Without the decoder layers that modules of these names are in. Raises ValueError where they are in no one stack."""
        found = [NUMBERED.fullmatch(name) for name in names]
        prefixes = {"" if one is None else one[1] for one in found}
        if len(prefixes) > 1 or "" in prefixes:
            raise ValueError("these modules are in no one stack of decoder layers")
        return cls(next(iter(prefixes), ""), frozenset(int(one[2]) for one in found))

    def after(self, number: int) -> int | None:
        """The number of a layer afterwards; None for one that is gone."""
        return None if number in self.gone else number - sum(each < number for each in self.gone)

    def number_of(self, name: str) -> int | None:
        """The number of the decoder layer that has this name or what it names; None for what is in none."""
        found = NUMBERED.fullmatch(name)
        return int(found[2]) if found is not None and found[1] == self.prefix else None

    def name_after(self, name: str) -> str | None:
        """A name afterwards; None for what is gone."""
        number = self.number_of(name)
        if number is None:
            return name
        after = self.after(number)
        return None if after is None else f"{self.prefix}{after}{name.removeprefix(self.prefix).lstrip('0123456789')}"
