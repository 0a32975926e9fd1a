"""How the container of one layer is laid out: which stacked tensors it has and which of their rows each expert uses.

The layout is what `config.json` carries for every layer that the stock model cannot hold; with it alone the module
can be built before any weight is read. Letters: E surviving experts, N stacked items, R rank.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import CheckpointError
from ..experts.routing import VECTORS, Routing
from ..plans.plan import LayerPlan, Plan
from ..shapes import LayerShape, ModelShape


@dataclass(frozen=True)
class Layout:
    """Row numbers per surviving expert, -1 where it has no such part. Kept experts come first among the dense rows."""

    hidden_size: int
    expert_width: int
    has_gate: bool
    has_bias: bool
    dense_of: tuple[int, ...]  # row of the dense stack: an expert's own weights or a shared base
    rank_of: tuple[int, ...]  # index into `ranks`
    adapter_of: tuple[int, ...]  # row inside the adapter stack of that rank
    constant_of: tuple[int, ...]
    ranks: tuple[int, ...] = ()  # the distinct ranks, one adapter stack each
    routing: Routing | None = None  # None: every selected expert runs

    @property
    def num_experts(self) -> int:
        return len(self.dense_of)

    @property
    def num_dense(self) -> int:
        return max(self.dense_of, default=-1) + 1

    @property
    def num_constants(self) -> int:
        return max(self.constant_of, default=-1) + 1

    @property
    def bias_of(self) -> tuple[int, ...]:
        """Row of an expert's own biases: an adapter without a dense row keeps those of the expert it stands in for."""
        row = itertools.count()
        pairs = zip(self.dense_of, self.rank_of, strict=True)
        return tuple(next(row) if self.has_bias and dense < 0 <= rank else -1 for dense, rank in pairs)

    def num_adapters(self, rank_index: int) -> int:
        pairs = zip(self.rank_of, self.adapter_of, strict=True)
        return max((row for index, row in pairs if index == rank_index), default=-1) + 1

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The container's tensors by name: the one place that says what they are called and how large they are."""
        d, f = self.hidden_size, self.expert_width
        gates = 2 if self.has_gate else 1
        shapes: dict[str, tuple[int, ...]] = {}
        if n := self.num_dense:
            shapes |= {"dense.gate_up_NGD": (n, gates * f, d), "dense.down_NDF": (n, d, f)}
            if self.has_bias:
                shapes |= {"dense.gate_up_bias_NG": (n, gates * f), "dense.down_bias_ND": (n, d)}
        for index, r in enumerate(self.ranks):
            n, stack = self.num_adapters(index), f"adapters.{index}."
            shapes[stack + "gate_up_A"] = (n, gates * r, d)
            if self.has_gate:
                shapes[stack + "gate_B_FR"] = (n, f, r)
            shapes |= {stack + "up_B_FR": (n, f, r), stack + "down_A_RF": (n, r, f), stack + "down_B_DR": (n, d, r)}
        if n := max(self.bias_of, default=-1) + 1:
            shapes |= {"biases.gate_up_bias_NG": (n, gates * f), "biases.down_bias_ND": (n, d)}
        if n := self.num_constants:
            shapes["constant_ND"] = (n, d)
        if self.routing and (vectors := self.routing.offsets_shape(self.num_experts, d, f, self.has_gate)):
            shapes["offsets_NV"] = vectors
        return shapes

    def active_parameters(self, top_k: int) -> int:
        """The most parameters that one token uses: its main experts, the largest there are, and its vectors.

        An expert counts with everything that it computes with, so a base that two of them share counts twice.
        """
        sizes: Counter[str] = Counter()  # of one row of each stack
        for name, shape in self.tensor_shapes().items():
            sizes[name.rpartition(".")[0] or name] += math.prod(shape[1:])

        def size(e: int) -> int:
            parts = ("dense", self.dense_of[e]), (f"adapters.{self.rank_of[e]}", self.rank_of[e])
            parts = *parts, ("biases", self.bias_of[e]), ("constant_ND", self.constant_of[e])
            return sum(sizes[stack] for stack, row in parts if row >= 0)

        largest = sorted(map(size, range(self.num_experts)))
        if self.routing is None:
            return sum(largest[-top_k:])
        return sum(largest[-min(self.routing.main, top_k) :]) + sizes["offsets_NV"] * self.routing.vectors_per_token(
            top_k
        )

    @classmethod
    def of(cls, plan: LayerPlan, shape: LayerShape) -> Layout:
        """The layout that holds a layer's plan."""
        ranks = tuple(sorted({slot.rank for slot in plan.slots if slot.rank}))
        num_kept = sum(slot.becomes == "kept" for slot in plan.slots)
        kept = constants = 0
        used = [0] * len(ranks)
        dense_of, rank_of, adapter_of, constant_of = [], [], [], []
        for e in plan.survivors:
            slot = plan.slots[e]
            if slot.becomes == "kept":
                dense_of.append(kept)
                kept += 1
            else:
                dense_of.append(-1 if slot.base is None else num_kept + slot.base)
            index = ranks.index(slot.rank) if slot.rank else -1
            rank_of.append(index)
            adapter_of.append(used[index] if slot.rank else -1)
            if slot.rank:
                used[index] += 1
            constant_of.append(constants if slot.constant else -1)
            constants += slot.constant
        rows = (tuple(dense_of), tuple(rank_of), tuple(adapter_of), tuple(constant_of))
        return cls(shape.hidden_size, shape.expert_width, shape.has_gate, shape.has_bias, *rows, ranks, plan.routing)

    def with_adapters(self, rows: tuple[int, ...], rank: int) -> Layout:
        """The layout for training in which these dense rows have an adapter of this rank, shared by all their users.

        It is the layout it was with rows and ranks added at the end, so whatever was there keeps its number. Such an
        adapter can be merged into its row; the users of these rows must have no adapter yet.
        """
        ranks = self.ranks if rank in self.ranks else (*self.ranks, rank)
        index = ranks.index(rank)
        first = self.num_adapters(index)
        rank_of, adapter_of = list(self.rank_of), list(self.adapter_of)
        for e, row in enumerate(self.dense_of):
            if row in rows:
                rank_of[e], adapter_of[e] = index, first + rows.index(row)
        return replace(self, rank_of=tuple(rank_of), adapter_of=tuple(adapter_of), ranks=ranks)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "routing" or value is not None}

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Raises CheckpointError for anything that `to_json` of a layout that a plan made cannot have written."""
        try:
            layout = cls(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()})
            if layout.routing is not None:
                layout = replace(layout, routing=Routing(**layout.routing))
            reason = layout._fault()
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"a container's layout in config.json cannot be read: {error}") from error
        if reason:
            raise CheckpointError(
                f"a container's layout in config.json is inconsistent: {reason}; the file was changed after it was written"
            )
        return layout

    def _fault(self) -> str:
        """What is wrong with the numbers, if anything."""
        rows = {name: getattr(self, name) for name in ("dense_of", "rank_of", "adapter_of", "constant_of")}
        numbers = (self.hidden_size, self.expert_width, *self.ranks, *(row for of in rows.values() for row in of))
        if not all(type(number) is int for number in numbers):
            return "sizes, ranks and rows are whole numbers"
        if (policy := self.routing) is not None and not (
            type(policy.main) is int
            and policy.main >= 1
            and policy.vectors in VECTORS
            and type(policy.renormalise) is bool
        ):
            return f"there is no such routing policy: {policy}"
        if len({len(of) for of in rows.values()}) > 1 or not self.dense_of:
            return f"its lists name {[len(of) for of in rows.values()]} experts"
        if not all(1 <= rank <= min(self.hidden_size, self.expert_width) for rank in self.ranks):
            return f"ranks {list(self.ranks)} do not fit {self.hidden_size} x {self.expert_width} weights"
        if any((a < 0) != (r < 0) for a, r in zip(self.adapter_of, self.rank_of, strict=True)):
            return "an adapter without a rank, or a rank without an adapter"
        for index in range(len(self.ranks)):
            pairs = zip(self.rank_of, self.adapter_of, strict=True)
            rows[f"adapter_of of rank {self.ranks[index]}"] = tuple(a for r, a in pairs if r == index)
        rows.pop("adapter_of")
        for name, of in rows.items():
            if set(of) - {-1} != set(range(max(of, default=-1) + 1)):
                return f"{name} = {list(of)} names rows below -1, or leaves some out"
        if set(self.rank_of) - {-1} != set(range(len(self.ranks))):
            return f"rank_of = {list(self.rank_of)} does not use the ranks {list(self.ranks)}"
        return ""


def active_parameters(shape: ModelShape, plan: Plan | None = None) -> int:
    """The most parameters that one token uses, of a stock model or of what a plan makes of it.

    Everything outside the routed experts counts, in each MoE layer the `main` (else top-k) largest experts, and the
    vectors of the other selected ones. Where experts differ in size it is an upper bound: a token may use smaller ones.
    """
    plans = {layer.layer: layer for layer in plan.layers} if plan else {}
    size = plan.size(shape) if plan else shape
    total = size.parameters - size.expert_parameters
    for layer in shape.layers:
        mine = plans.get(layer.name)
        total += Layout.of(mine, layer).active_parameters(layer.top_k) if mine else layer.top_k * layer.parameters()
    return total
