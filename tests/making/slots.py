"""What tests ask of slots and layouts, by the kinds of parts that come with Locum."""

from __future__ import annotations

from dataclasses import dataclass

from locum.containers.layout import Layout
from locum.experts.parts.constant import Constant
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_biases import OwnBiases
from locum.experts.parts.shared_base import SharedBase
from locum.plans.plan import Slot


def part_of(slot: Slot, kind):
    return next((part for part in slot.parts if isinstance(part, kind)), None)


def base_of(slot: Slot) -> int | None:
    found = part_of(slot, SharedBase)
    return None if found is None else found.base


def rank_of(slot: Slot) -> int:
    found = part_of(slot, LowRank)
    return 0 if found is None else found.rank


def start_of(slot: Slot) -> str:
    found = part_of(slot, LowRank)
    return "gaussian" if found is None else found.start


def has_constant(slot: Slot) -> bool:
    return part_of(slot, Constant) is not None


@dataclass(frozen=True)
class Rows:
    """A layout as lists of rows, -1 for none; `rank_of` counts the stacks of adapters."""

    dense_of: tuple[int, ...]
    rank_of: tuple[int, ...]
    adapter_of: tuple[int, ...]
    constant_of: tuple[int, ...]
    bias_of: tuple[int, ...]
    ranks: tuple[int, ...]


def rows_of(layout: Layout) -> Rows:
    none = (-1,) * layout.num_experts
    adapters = layout.stacks_of(LowRank)
    of = [next((n for n, s in enumerate(adapters) if s.rows[e] >= 0), -1) for e in range(layout.num_experts)]
    row = tuple(adapters[n].rows[e] if n >= 0 else -1 for e, n in enumerate(of))
    constant, bias = (next((s.rows for s in layout.stacks_of(kind)), none) for kind in (Constant, OwnBiases))
    return Rows(layout.dense_of, tuple(of), row, constant, bias, tuple(s.variant[0] for s in adapters))
