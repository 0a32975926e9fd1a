"""Compression methods: each file registers one, as a frozen dataclass of options with `needs()` and `plan(...)`.

    plan(statistics, shape, amount) -> list[LayerPlan]      numbers in, slots out; amount from 0 (nothing) to 1 (most)

A method that has to try removals on the model itself also has `explore(explorer, progress)`, which finds statistics
that its `plan` then reads; `locum search` runs it and writes them to a file, so one search serves any target. Its
`searched_with` names the options that the search reads; plans take them from the file.

A method `saves` "stored" parameters, so that --remove or --fit says how many, or "active" ones, which its own options
say. One that needs no statistics plans from a checkpoint's shape alone.

What a plan's slots mean in weights is in `stand_ins.py`, the same for all methods. Other packages offer methods under
the entry-point group "locum.methods".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..plans.plan import LayerPlan
from ..registry import Registry, import_modules
from ..shapes import ModelShape
from ..stats.sums import Statistics


class Method(Protocol):
    """What the rest of Locum needs of a method."""

    saves: str

    def needs(self) -> tuple[str, ...]:
        """Statistics that planning and building read."""
        ...

    def plan(self, statistics: Statistics, shape: ModelShape, amount: float) -> list[LayerPlan]:
        """`statistics` is None where the method needs none and none are there."""
        ...


class Explorer(Protocol):
    """A live model on which removals can be tried; `explore.py` has the real one. Letters: C candidates, E experts."""

    shape: ModelShape  # of the original model

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        """[C] float64: ||F(X) - F_without(X)||_F over the cached tokens of that layer, the router re-run without the
        removed."""
        ...

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        """[C] float64: mean next-token loss of the whole model without them, minus that of the full model, nats per
        token."""
        ...

    def block_error(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] float64: each candidate maps the consecutive layers of one block to removed [E] bools; || hidden state
        after the block's last decoder layer, original minus pruned ||_F, attention, norms and residuals included, from
        the original input."""
        ...

    def prune(self, removed: Mapping[str, Tensor]) -> None:
        """Removes these experts from the live model for good and caches afresh; masks stay in the original numbering
        and from now on what was pruned counts as removed on both sides of every comparison."""
        ...


METHODS: Registry[type[Any]] = Registry("method", "locum.methods")


def method(name: str, paper: str, saves: str = "stored") -> Callable[[type], type]:
    """Register a method under the name its paper gives it, and say what it saves: "stored" or "active" parameters."""

    def register(cls: type) -> type:
        cls.name, cls.paper, cls.saves = name, paper, saves
        return METHODS.add(name, cls)

    return register


import_modules(sys.modules[__name__])
