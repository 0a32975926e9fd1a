"""Named, discoverable things (statistics, criteria, methods): registered where they are defined, listed nowhere else."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from .errors import OptionError, unknown

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """A table of one kind of thing. `entry_points` names the group under which other packages offer more of them.

    Those packages are imported the first time that somebody lists the table or asks it for a name it does not have.
    """

    def __init__(self, kind: str, entry_points: str | None = None) -> None:
        self.kind = kind
        self.entry_points = entry_points
        self._items: dict[str, Item] = {}
        self._offered = entry_points is not None

    def _import_offered(self) -> None:
        if self._offered:
            self._offered = False
            for point in importlib.metadata.entry_points(group=self.entry_points):
                point.load()

    def add(self, name: str, item: Item) -> Item:
        if name in self._items:
            raise OptionError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> Item:
        if name not in self:
            raise OptionError(unknown(self.kind, name, self._items))
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._items:
            self._import_offered()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._import_offered()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        self._import_offered()
        return len(self._items)

    def items(self) -> list[tuple[str, Item]]:
        return [(name, self._items[name]) for name in self]


def import_modules(package: Any) -> None:
    """Import every module of a package so that what they register is known. Import errors are raised, never hidden."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
