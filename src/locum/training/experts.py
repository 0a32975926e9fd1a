"""A container in training: rows set apart to be trained, old weights that fade out, adapters that are rounded. A served container
knows of none. Rows in few bits are frozen, and stay bytes.

LightMoE (arXiv 2603.12645, Eq. 6): a replaced expert's weights are beta W_old + (1 - beta) W_base + B A.

Letters: N stacked items, D model width, Q pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..containers.clusters import Rows, Term, Terms, unbound
from ..containers.container import StandInExperts
from ..containers.layout import Layout, StackLayout
from ..containers.stack import Row, Stack
from ..experts.parts.own_weights import OwnWeights
from .rounding import Rounding

DENSE = OwnWeights.prefix.removesuffix(".")


class TrainingExperts(StandInExperts):
    """Some rows of a stack may lie apart, in a stack of their own, so that they train while the others are frozen: shared bases, or
    what chosen experts have for themselves. Only numbers do.

    `old`, with `old_of`, a row per expert or -1, holds the old weights, and `beta` is their share. `rounding` has the adapters that
    the checkpoint has in few bits, by the path of their stack and the tensor; their layout here names no format.
    """

    def __init__(
        self, layout: Layout, activate: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(layout, activate, dtype, device)
        self.apart: dict[str, tuple[int, ...]] = {}  # by the path of a stack: its rows that lie apart
        self.old: Stack | None = None
        self.old_of: tuple[int, ...] = (-1,) * layout.num_experts
        self.beta = 0.0
        self.rounding: dict[str, dict[str, Rounding]] = {}

    def held(self) -> dict[str, Any]:
        found = super().held()
        for path, of in self.rounding.items():
            found[path] = SimpleNamespace(**{leaf: rounded(getattr(found[path], leaf)) for leaf, rounded in of.items()})
        return found

    def may_group(self, x_TD: Tensor) -> bool:
        return not self.apart and self.old is None and super().may_group(x_TD)

    def terms(self, x_TD: Tensor) -> TrainingTerms:
        return TrainingTerms(self, x_TD)

    def stack_apart(self, path: str) -> Stack:
        """The stack of the rows that lie apart from the stack at this path."""
        return self.get_submodule(_name_apart(path))

    @property
    def shared(self) -> Stack | None:
        """The dense rows that lie apart, which are the shared bases where a run trains adapters."""
        return self.stack_apart(DENSE) if DENSE in self.apart else None

    def split_bases(self, num_own: int) -> None:
        """Set the dense rows of numbers from `num_own` on apart: the experts' own need no optimizer state then."""
        if self.layout.num_whole_numbers > num_own:
            self.set_apart(DENSE, range(num_own, self.layout.num_whole_numbers))

    def set_apart(self, path: str, rows: Sequence[int]) -> None:
        """Move these rows of a stack of numbers, at least one, to one of their own. All of them are frozen."""
        stack, module = next(stack for there, stack in self.paths if there == path), self.stack(path)
        leaves = stack.kind.tensors(stack.variant, self.layout)
        tensors = {leaf: getattr(module, leaf).detach() for leaf in leaves}
        rest = [row for row in range(stack.num_rows) if row not in set(rows)]
        self.add_module(_name_apart(path), Stack.holding({leaf: x[list(rows)] for leaf, x in tensors.items()}))
        for leaf, tensor in tensors.items():
            # A copy, for a view would keep the memory of all rows, which training may have a second time in float32.
            module.register_parameter(leaf, nn.Parameter(tensor[rest], requires_grad=False))
        self.apart[path] = tuple(rows)

    def whole_tensors(self) -> dict[str, Tensor]:
        """Everything by the names of the layout, the rows that lie apart in their places again, bytes as they are."""
        found: dict[str, Tensor] = {}
        for prefix, stack in self.layout.prefixed():
            path = prefix.removesuffix(".")
            for leaf in stack.kind.tensors(stack.variant, self.layout):
                tensor = getattr(self.stack(path), leaf).detach()
                if path in self.apart:
                    apart = getattr(self.stack_apart(path), leaf).detach()
                    wide = torch.promote_types(tensor.dtype, apart.dtype)
                    tensor = torch.stack([row.to(wide) for row in _in_order(tensor, apart, self.apart[path])])
                found[prefix + leaf] = tensor
        return found | {name: self.get_parameter(name).detach() for name in self.policy_tensors}

    def trainable(self, with_bases: bool) -> Iterator[nn.Parameter]:
        """What recovery by adapters trains: what kinds of parts say of themselves, and what the policy stores."""
        for path, stack in self.paths:
            leaves = stack.kind.tensors(stack.variant, self.layout)
            if stack.kind.trains == "always" or (with_bases and stack.kind.trains == "with bases"):
                found = (getattr(self.stack(path), leaf) for leaf in leaves)
                yield from (tensor for tensor in found if tensor.is_floating_point())
        if with_bases and self.shared is not None:
            yield from self.shared.parameters()
        yield from (self.get_parameter(name) for name in self.policy_tensors)


class TrainingTerms(Terms):
    """The terms of a container in training: one more for old weights, and parts that come in as these fade out."""

    def __init__(self, container: TrainingExperts, x_TD: Tensor) -> None:
        self.apart = {path: container.stack_apart(path)() for path in container.apart}
        super().__init__(container, x_TD)
        if any(path != DENSE for path in container.apart):  # grouped products ask for whole stacks
            self.way = None
        leaves = OwnWeights.tensors((), container.layout)
        self.old = {} if container.old is None else unbound(container.old(), leaves)

    def _rows_of(self, path: str, stack: StackLayout, dtype: torch.dtype) -> Rows:
        rows = super()._rows_of(path, stack, dtype)
        if path not in self.apart:
            return rows
        apart, places = unbound(self.apart[path], rows), self.container.apart[path]
        return {leaf: _in_order(rows[leaf], apart[leaf], places) for leaf in rows}

    def anything(self) -> Iterator[Tensor]:
        yield from super().anything()
        yield from (tensor[0] for held in self.apart.values() for tensor in vars(held).values())
        yield from (tensors[0] for tensors in self.old.values() if tensors)

    def fade(self, e: int) -> float:
        return 1 - self.container.beta if self.container.old_of[e] >= 0 else 1.0

    def own(self, e: int, grouped: bool = False) -> list[Term]:
        terms, row = super().own(e, grouped), self.container.old_of[e]
        if row < 0:
            return terms
        return [Term(OwnWeights, Row(self.old, row), self.container.beta), *terms]


def _name_apart(path: str) -> str:
    return f"apart_{path.replace('.', '_') or 'own'}"


def _in_order(rest: Sequence[Tensor], apart: Sequence[Tensor], places: Sequence[int]) -> tuple[Tensor, ...]:
    """The rows of a stack, of which some, whose places are said, come from another."""
    moved, others = dict(zip(places, apart, strict=True)), iter(rest)
    return tuple(moved[row] if row in moved else next(others) for row in range(len(rest) + len(apart)))
