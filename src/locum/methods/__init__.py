"""Compression methods: each file registers one, as a frozen dataclass of options with `needs()` and `plan(...)`.

    plan(statistics, shape, amount) -> list[LayerPlan]      numbers in, slots out; amount from 0 (nothing) to 1 (most)

What a plan's slots mean in weights is in `stand_ins.py`, the same for all methods. Other packages offer methods under
the entry-point group "locum.methods".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from ..plan import LayerPlan
from ..registry import Registry, import_modules
from ..shapes import ModelShape
from ..statistics import Statistics


class Method(Protocol):
    """What the rest of Locum needs of a method."""

    def needs(self) -> tuple[str, ...]:
        """Statistics that planning and building read."""
        ...

    def plan(self, statistics: Statistics, shape: ModelShape, amount: float) -> list[LayerPlan]: ...


METHODS: Registry[type[Any]] = Registry("method", "locum.methods")


def method(name: str, paper: str) -> Callable[[type], type]:
    """Register a method under the name its paper gives it."""

    def register(cls: type) -> type:
        cls.name, cls.paper = name, paper
        return METHODS.add(name, cls)

    return register


import_modules(sys.modules[__name__])
