"""How the container of one layer is laid out: which stacked tensors it has and which of their rows each expert uses.

The layout is what `config.json` carries for every layer that the stock model cannot hold; with it alone the module
can be built before any weight is read. A stack holds the tensors of one kind of part (experts/parts/) side by side, in one
number format; a stack in the dtype of the checkpoint names none.

Letters: E experts (that survive), N stacked items, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, OptionError
from ..experts.parts.low_rank import LowRank
from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.part import PARTS, Part, Sizes
from ..experts.policies.policy import Policy, read_policy
from ..formats.rows import is_packed, stored_shape
from ..plans.layer_plan import StackKey
from ..plans.plan import LayerPlan, Plan
from ..shapes import LayerShape, ModelShape
from .layout_version_1 import from_version_1

ALIKE = ("hidden_size", "expert_width", "has_gate", "has_bias", "num_experts")


@dataclass(frozen=True)
class StackLayout:
    """One stack: a kind of part, what tells it from other stacks of that kind, the row of every expert, or -1, and its format."""

    part: str
    variant: tuple[int, ...]
    rows: tuple[int, ...]
    format: str = ""  # of its matrices (formats/rows.py)

    @property
    def kind(self) -> type[Part]:
        return PARTS[self.part]

    @property
    def num_rows(self) -> int:
        return max(self.rows, default=-1) + 1

    def stored(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The shape of one row of every tensor as it is stored. Raises OptionError where the format cannot hold it."""
        rows = self.kind.tensors(self.variant, sizes)
        return {leaf: stored_shape(self.format, row) for leaf, row in rows.items()}

    def packed(self, sizes: Sizes) -> tuple[str, ...]:
        """The tensors that are bytes."""
        rows = self.kind.tensors(self.variant, sizes)
        return tuple(leaf for leaf, row in rows.items() if is_packed(self.format, row))

    def parameters(self, sizes: Sizes) -> int:
        """Numbers in one row."""
        return sum(math.prod(row) for row in self.kind.tensors(self.variant, sizes).values())


@dataclass(frozen=True)
class Layout:
    """The stacks of a layer's container, own weights and bases first, and its routing policy."""

    hidden_size: int
    expert_width: int
    has_gate: bool
    has_bias: bool
    num_experts: int
    stacks: tuple[StackLayout, ...]
    routing: Policy | None = None  # None: every selected expert runs

    def prefixed(self) -> Iterator[tuple[str, StackLayout]]:
        """Every stack with the prefix of its tensors' names: stacks of one kind are numbered in their order, or, where their
        prefix has no place for a number, told apart by their format."""
        seen: dict[str, int] = {}
        for stack in self.stacks:
            number, prefix = seen.setdefault(stack.part, 0), stack.kind.prefix
            seen[stack.part] += 1
            if stack.format and "{}" not in prefix:
                prefix = f"{prefix.removesuffix('.')}_{stack.format.replace('-', '_')}."
            yield prefix.format(number), stack

    def stacks_of(self, kind: type[Part]) -> list[StackLayout]:
        return [stack for stack in self.stacks if stack.part == kind.name]

    def shared_by(self, stack: StackLayout) -> StackLayout | None:
        """The stack whose rows this one's products read too, if any."""
        wanted = (stack.kind.shares, stack.variant, stack.format)
        return next((s for s in self.stacks if (s.part, s.variant, s.format) == wanted), None)

    @property
    def dense_of(self) -> tuple[int, ...]:
        """Per expert, the row of its whole weights (its own, or a base that it shares), or -1. Rows of several stacks are
        counted through."""
        found, before = [-1] * self.num_experts, 0
        for stack in self.stacks_of(OwnWeights):
            found = [before + row if row >= 0 else there for row, there in zip(stack.rows, found, strict=True)]
            before += stack.num_rows
        return tuple(found)

    @property
    def num_dense(self) -> int:
        return max(self.dense_of, default=-1) + 1

    def rows_alone(self, experts: Collection[int]) -> dict[str, tuple[int, ...]]:
        """The rows that no other than these experts use, by the prefix of their stack; stacks without such rows left out."""
        found = {}
        for prefix, stack in self.prefixed():
            taken = {row for e, row in enumerate(stack.rows) if e not in experts}
            rows = tuple(row for row in range(stack.num_rows) if row not in taken)
            found |= {prefix: rows} if rows else {}
        return found

    @property
    def num_whole_numbers(self) -> int:
        """The dense rows that are numbers: they come before those in few bits."""
        return sum(stack.num_rows for stack in self.stacks_of(OwnWeights) if not stack.format)

    @property
    def formats(self) -> tuple[str, ...]:
        """Those of stacks in few bits."""
        return tuple(dict.fromkeys(stack.format for stack in self.stacks if stack.format))

    @property
    def only_dense(self) -> bool:
        """Whether every expert is nothing but whole weights of its own, as the original has them."""
        own = self.dense_of == tuple(range(self.num_experts))
        return own and len(self.stacks) == 1 and self.routing is None and not self.formats

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The container's tensors by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for prefix, stack in self.prefixed():
            for leaf, row in stack.stored(self).items():
                shapes[prefix + leaf] = (stack.num_rows, *row)
        return shapes | (self.routing.tensors(self) if self.routing else {})

    @property
    def packed_tensors(self) -> frozenset[str]:
        """Those of them that are bytes."""
        return frozenset(prefix + leaf for prefix, stack in self.prefixed() for leaf in stack.packed(self))

    def parameters(self) -> int:
        """Numbers that the container stands for."""
        stored = self.routing.tensors(self).values() if self.routing else ()
        return sum(s.num_rows * s.parameters(self) for s in self.stacks) + sum(map(math.prod, stored))

    def nbytes(self, itemsize: int) -> int:
        """Bytes of the tensors, where a number that is in no format has `itemsize`."""
        packed = self.packed_tensors
        shapes = self.tensor_shapes().items()
        return sum(math.prod(shape) * (1 if name in packed else itemsize) for name, shape in shapes)

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """Per expert, the hidden units that it computes: its own width where it is narrowed, 0 where it has no products."""
        units = [0] * self.num_experts
        for stack in self.stacks:
            if stack.kind.has_products:
                width = stack.variant[0] if stack.kind.is_narrow else self.expert_width
                units = [max(n, width if row >= 0 else 0) for n, row in zip(units, stack.rows, strict=True)]
        return tuple(units)

    @property
    def expert_parameters(self) -> tuple[int, ...]:
        """Per expert, the parameters that it computes with."""
        sizes = [0] * self.num_experts
        for stack in self.stacks:
            one = stack.parameters(self)
            sizes = [size + (one if row >= 0 else 0) for size, row in zip(sizes, stack.rows, strict=True)]
        return tuple(sizes)

    def active_parameters(self, top_k: int) -> int:
        """The most parameters that one token uses: the largest experts that can run for it, and the policy's rows.

        An expert counts with everything that it computes with, so a base that two of them share counts twice. Where it
        was counted how many run for a token on average, it is so many of them.
        """
        most, average = (
            (top_k, top_k) if self.routing is None else (self.routing.most(top_k), self.routing.average(top_k))
        )
        stored = self.routing.active(self, top_k) if self.routing else 0
        experts = round(sum(sorted(self.expert_parameters)[-most:]) * average / most)
        return experts + stored

    @classmethod
    def of(cls, plan: LayerPlan, shape: LayerShape) -> Layout:
        """The layout that holds a layer's plan."""
        stacks = []
        # Stacks of one kind in the order of their variants; kinds in the order of their names in the container.
        for (kind, variant, format), row_of in sorted(plan.rows(shape.has_bias).items(), key=_place):
            number = {key: n for n, key in enumerate(sorted(set(row_of.values())))}
            rows = tuple(number[row_of[e]] if e in row_of else -1 for e in plan.survivors)
            stacks.append(StackLayout(kind.name, variant, rows, format))
        sizes = (shape.hidden_size, shape.expert_width, shape.has_gate, shape.has_bias, len(plan.survivors))
        routing = None if plan.routing is None else plan.routing.among(plan.survivors)
        return cls(*sizes, tuple(stacks), routing)

    def with_adapters(self, rows: tuple[int, ...], rank: int) -> Layout:
        """The layout for training in which these dense rows have an adapter of this rank, shared by all their users.

        It is the layout it was with rows and stacks added at the end of their kind, so whatever was there keeps its
        number. Such an adapter can be merged into its row; the users of these rows must have no adapter yet.
        """
        there = next((s for s in self.stacks_of(LowRank) if s.variant == (rank,) and not s.format), None)
        first = there.num_rows if there else 0
        given = [first + rows.index(row) if row in rows else -1 for row in self.dense_of]
        if there:
            more = tuple(new if new >= 0 else old for new, old in zip(given, there.rows, strict=True))
            stacks = [replace(s, rows=more) if s is there else s for s in self.stacks]
        else:
            behind = max(
                (i for i, s in enumerate(self.stacks) if s.kind.is_whole or s.part == LowRank.name), default=-1
            )
            stacks = list(self.stacks)
            stacks.insert(behind + 1, StackLayout(LowRank.name, (rank,), tuple(given)))
        return replace(self, stacks=tuple(stacks))

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in ALIKE}
        fields = [dataclasses.asdict(stack) for stack in self.stacks]
        data["stacks"] = [{name: x for name, x in stack.items() if name != "format" or x} for stack in fields]
        if self.routing is not None:
            data["policy"] = self.routing.to_json()
        return data

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Raises CheckpointError for anything that `to_json` of a layout that a plan made cannot have written."""
        try:
            given = dict(from_version_1(data) if "dense_of" in data else data)
            policy = given.pop("policy", None)
            stacks = tuple(StackLayout(**{**s, **_tuples(s)}) for s in given.pop("stacks"))
            layout = cls(**given, stacks=stacks, routing=None if policy is None else _policy(policy))
            reason = layout._fault()
        except (TypeError, AttributeError, KeyError, ValueError, OptionError) as error:
            raise CheckpointError(f"a container's layout in config.json cannot be read: {error}") from error
        if reason:
            raise CheckpointError(
                f"a container's layout in config.json is inconsistent: {reason}; the file was changed after it was written"
            )
        return layout

    def _fault(self) -> str:
        """What is wrong with the numbers, if anything."""
        numbers = [self.hidden_size, self.expert_width, self.num_experts]
        numbers += [n for stack in self.stacks for n in (*stack.rows, *stack.variant)]
        if not all(type(number) is int for number in numbers) or min(numbers[:3]) < 1:
            return "sizes, ranks and rows are whole numbers"
        if any(type(stack.format) is not str for stack in self.stacks):
            return f"formats are texts, not {[stack.format for stack in self.stacks]!s:.200}"
        for prefix, stack in self.prefixed():
            name = f"{prefix or stack.part}: rows {list(stack.rows)!s:.200}"
            if len(stack.rows) != self.num_experts:
                return f"{name} are those of {len(stack.rows)} experts, not {self.num_experts}"
            if reason := stack.kind.variant_fault(stack.variant, self) or _format_fault(stack, self):
                return reason
            if stack.kind.shares and not self._has_shared(stack):
                return f"{name} have no {stack.kind.shares} beside them"
            used = set(stack.rows) - {-1}
            if not used or min(used) < 0 or len(used) != stack.num_rows:  # no set of rows: a file may name any number
                return f"{name} lie below -1, or leave some out"
        keys = [(stack.part, stack.variant, stack.format) for stack in self.stacks]
        if len(set(keys)) < len(keys):
            return f"two stacks are alike: {keys}"
        return ""

    def _has_shared(self, stack: StackLayout) -> bool:
        shared = self.shared_by(stack)
        return shared is not None and all(
            there >= 0 for row, there in zip(stack.rows, shared.rows, strict=True) if row >= 0
        )


def _place(item: tuple[StackKey, Any]) -> tuple[Any, ...]:
    kind, variant, format = item[0]
    return not kind.is_whole, not kind.has_products, kind.prefix == "", kind.name, variant, format


def _format_fault(stack: StackLayout, layout: Layout) -> str:
    """What is wrong with the format of a stack, if anything. Raises OptionError for one that is not known or does not fit."""
    if stack.format and not stack.kind.has_products:
        return f"{stack.part} has a format, {stack.format!r}, and no matrices"
    stack.stored(layout)
    return ""


def _tuples(stack: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(stack[name]) for name in ("variant", "rows")}


def _policy(data: dict[str, Any]) -> Policy:
    policy = read_policy(data)
    policy.check("its routing policy", None)
    return policy


def active_parameters(shape: ModelShape, plan: Plan | None = None) -> int:
    """The most parameters that one token uses, of a stock model or of what a plan makes of it.

    Everything outside the routed experts counts, in each MoE layer the largest experts that can run, and what their
    policy reads. Where experts differ in size it is an upper bound: a token may use smaller ones. Of policies by which tokens
    differ in the number of their experts, it is the average that calibration counted.
    """
    shape = shape.model
    plans = {layer.layer: layer for layer in plan.layers} if plan else {}
    size = plan.size(shape) if plan else shape
    total = size.parameters - size.expert_parameters
    for layer in (plan.selecting(shape) if plan else shape).layers:
        mine = plans.get(layer.name)
        total += Layout.of(mine, layer).active_parameters(layer.top_k) if mine else layer.top_k * layer.parameters()
    return total


def experts_per_token(shape: ModelShape, routing: Mapping[str, Policy | None]) -> list[float]:
    """Experts of a layer that the router selects for a token, and that run for it on average; means over layers."""
    run = [policy.average(x.top_k) if (policy := routing.get(x.name)) else x.top_k for x in shape.layers]
    return [sum(layer.top_k for layer in shape.layers) / len(run), sum(run) / len(run)]
