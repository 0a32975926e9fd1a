"""A container in training: bases set apart, and old weights that fade out. A served container knows of neither.

LightMoE (arXiv 2603.12645, Eq. 6): a replaced expert's weights are beta W_old + (1 - beta) W_base + B A.

Letters: N stacked items, D model width, Q pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..containers.clusters import Term, Terms, unbound
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..containers.stack import Stack
from ..experts.parts.own_weights import OwnWeights

DENSE = OwnWeights.prefix.removesuffix(".")


class TrainingExperts(StandInExperts):
    """`shared` holds the last dense rows (the bases), so that they train while the experts' own rows are frozen.

    `old`, with `old_of`, a row per expert or -1, holds the old weights, and `beta` is their share.
    """

    def __init__(
        self, layout: Layout, activate: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(layout, activate, dtype, device)
        self.shared: Stack | None = None
        self.old: Stack | None = None
        self.old_of: tuple[int, ...] = (-1,) * layout.num_experts
        self.beta = 0.0

    def may_group(self, x_TD: Tensor) -> bool:
        return self.shared is None and self.old is None and super().may_group(x_TD)

    def terms(self, x_TD: Tensor) -> TrainingTerms:
        return TrainingTerms(self, x_TD)

    def split_bases(self, num_own: int) -> None:
        """Move the dense rows from `num_own` on to a stack of their own: the others need no optimizer state then."""
        if self.layout.num_dense <= num_own:
            return
        tensors = {name: p.detach() for name, p in self.stack(DENSE).named_parameters()}
        self.shared = Stack.holding({name: t[num_own:].clone() for name, t in tensors.items()})
        self.add_module(DENSE, Stack.holding({name: t[:num_own] for name, t in tensors.items()}))

    def dense_tensors(self) -> dict[str, Tensor]:
        """All dense rows again, by the names of their stack."""
        if not self.layout.num_dense:
            return {}
        stacks = [self.stack(DENSE), *([] if self.shared is None else [self.shared])]
        names = [name for name, _ in stacks[0].named_parameters()]
        return {name: torch.cat([stack.get_parameter(name).detach() for stack in stacks]) for name in names}

    def trainable(self, with_bases: bool) -> Iterator[nn.Parameter]:
        """What recovery by adapters trains: what kinds of parts say of themselves, and what the policy stores."""
        for path, stack in self.paths:
            leaves = stack.kind.tensors(stack.variant, self.layout)
            if stack.kind.trains == "always" or (with_bases and stack.kind.trains == "with bases"):
                yield from (getattr(self.stack(path), leaf) for leaf in leaves)
        if with_bases and self.shared is not None:
            yield from self.shared.parameters()
        yield from (self.get_parameter(name) for name in self.policy_tensors)


class TrainingTerms(Terms):
    """The terms of a container in training: one more for old weights, and parts that come in as these fade out."""

    def __init__(self, container: TrainingExperts, x_TD: Tensor) -> None:
        super().__init__(container, x_TD)
        leaves = OwnWeights.tensors((), container.layout)
        self.shared = {} if container.shared is None else unbound(container.shared(), leaves)
        self.old = {} if container.old is None else unbound(container.old(), leaves)
        self.num_own = container.layout.num_dense - len(self.shared.get("down_NDF", ()))

    def anything(self) -> Iterator[Tensor]:
        yield from super().anything()
        yield from (tensors[0] for rows in (self.shared, self.old) for tensors in rows.values() if tensors)

    def fade(self, e: int) -> float:
        return 1 - self.container.beta if self.container.old_of[e] >= 0 else 1.0

    def base(self, row: int) -> Term | None:
        if row < self.num_own:
            return super().base(row)
        return Term(OwnWeights, {leaf: rows[row - self.num_own] for leaf, rows in self.shared.items()})

    def own(self, e: int, grouped: bool = False) -> list[Term]:
        terms, row = super().own(e, grouped), self.container.old_of[e]
        if row < 0:
            return terms
        return [Term(OwnWeights, {leaf: rows[row] for leaf, rows in self.old.items()}, self.container.beta), *terms]
