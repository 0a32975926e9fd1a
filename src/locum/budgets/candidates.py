"""What may become of an expert: every candidate as the plan of a whole layer in which all experts become that.

Of a base there is one for every group of experts (medoids.py): the rows of its medoid, which then are that expert's own and cost nothing
more, or the mean of the group.

A plan that mixes takes each expert's slot from one of them. So whatever a plan can say can be a candidate, it is built and measured
as it would be applied, and its bytes are the plan's.

The order is that of the statistic `candidate_error`: where it changes, files made before say something else.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..experts.parts.constant import Constant
from ..experts.parts.low_rank import LowRank
from ..experts.parts.narrowed import Narrowed
from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.part import Part
from ..experts.parts.shared_base import SharedBase
from ..plans.bits import FewBits
from ..plans.layer_plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot
from ..shapes import LayerShape
from .medoids import groupings
from .ranks import break_even, rank_step
from .selection import mass_weights

KINDS = ("keep", "bits", "low-rank", "narrow", "base", "constant", "nothing", "drop")
GROUP = 32  # numbers that share a scale
MULTIPLE = 8  # of ranks: codes fill whole bytes
WIDTHS = (0.75, 0.5, 0.25)  # of an expert's columns
LOW_RANK = (0.06, 0.12, 0.25, 0.4, 0.55, 0.7)  # numbers of the factors, as shares of an expert's
OVER_BASE = (0.0, 0.06, 0.25)
GROUPINGS = 2  # ways to group a layer's experts, at most
CORRECTING = 0.12


class Candidate(NamedTuple):
    """One of KINDS, and what an expert becomes; None where a layer has no such candidate."""

    kind: str
    plan: LayerPlan | None


def candidates(layer: LayerShape, statistics: Mapping[str, Tensor]) -> tuple[Candidate, ...]:
    """All candidates for a layer's experts, as many for every layer. Groups follow from `weight_product`, and what an expert counts for in
    the mean of its group from `count`."""
    return tuple(_candidates(layer, statistics))


def _candidates(layer: LayerShape, statistics: Mapping[str, Tensor]) -> Iterator[Candidate]:
    def of(kind: str, slot: Slot | None) -> Candidate:
        return Candidate(kind, None if slot is None else LayerPlan(layer.name, (slot,) * layer.num_experts))

    def packed(bits: int, *parts: Part | None) -> Slot | None:
        """A slot of these parts; none where one of them is none, or where numbers are in a format already."""
        if None in parts or layer.expert_bytes:
            return None
        few = FewBits.of(str(bits), GROUP, "gptq")
        return Slot(tuple(replace(part, format=few.format, quantiser=few.quantiser) for part in parts))

    yield of("keep", KEPT)
    for bits in (8, 4, 3, 2):
        yield of("bits", packed(bits, OwnWeights()))
    own, corrected = packed(2, OwnWeights()), packed(4, *_adapters(layer, (CORRECTING,)))
    yield of("bits", Slot((*own.parts, *corrected.parts)) if own and corrected else None)
    for adapter in _adapters(layer, LOW_RANK):
        yield of("low-rank", packed(4, adapter))
    for narrowed in _narrowed(layer):
        yield of("narrow", packed(4, narrowed))
    for group_E, bases in _shared(statistics):
        for share, adapter in zip(OVER_BASE, _adapters(layer, OVER_BASE), strict=True):
            slots = [packed(4, SharedBase(g), *([adapter] if share else [])) for g in group_E]
            is_there = bases and None not in slots
            yield Candidate("base", LayerPlan(layer.name, tuple(slots), bases) if is_there else None)
    yield of("constant", Slot((Constant(),)))
    yield of("nothing", NOTHING)
    yield of("drop", None if layer.refuse_dropping or layer.num_groups > 1 else DROPPED)


def _shared(statistics: Mapping[str, Tensor]) -> Iterator[tuple[tuple[int, ...], tuple[Base, ...]]]:
    """For each way to group a layer's experts, medoids and then means: the group of every expert, and a base for each group. There are as
    many for every layer: none where a layer has not so many ways."""
    found, count_E = groupings(statistics["weight_product"]), statistics["count"]
    for medoid_E in (*found, *[()] * (GROUPINGS - len(found))):
        medoids = sorted(set(medoid_E))
        group_E = tuple(medoids.index(medoid) for medoid in medoid_E)
        groups = [[e for e, medoid in enumerate(medoid_E) if medoid == m] for m in medoids]
        yield group_E, tuple(Base((m,), (1.0,)) for m in medoids)
        yield group_E, tuple(Base(tuple(group), mass_weights(count_E, group)) for group in groups)


def _adapters(layer: LayerShape, shares: tuple[float, ...]) -> Iterator[LowRank | None]:
    """An adapter for each share of an expert's numbers; none where it is the one before, or no smaller than the expert."""
    before = 0
    for share in shares:
        rank = max(MULTIPLE, round(share * break_even(layer) / MULTIPLE) * MULTIPLE)
        fits = share and before < rank < break_even(layer)
        yield LowRank(rank, "whitened") if fits else None
        before = rank if fits else before


def _narrowed(layer: LayerShape) -> Iterator[Narrowed | None]:
    step, before = rank_step(layer, 32), layer.expert_width
    for share in WIDTHS:
        width = max(step, round(share * layer.expert_width / step) * step)
        yield Narrowed(width, "camera") if width < before else None
        before = min(width, before)
