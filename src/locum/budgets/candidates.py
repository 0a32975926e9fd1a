"""What may become of an expert: every candidate as the plan of a whole layer in which all experts become that.

A plan that mixes takes each expert's slot from one of them. So whatever a plan can say can be a candidate, it is built and measured
as it would be applied, and its bytes are the plan's.

The order is that of the statistic `candidate_error`: where it changes, files made before say something else.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from .ranks import break_even, rank_step
from .selection import mass_weights

KINDS = ("keep", "bits", "low-rank", "narrow", "base", "constant", "nothing", "drop")
GROUP = 32  # numbers that share a scale
MULTIPLE = 8  # of ranks: codes fill whole bytes
WIDTHS = (0.75, 0.5, 0.25)  # of an expert's columns
LOW_RANK = (0.06, 0.12, 0.25, 0.4, 0.55, 0.7)  # numbers of the factors, as shares of an expert's
OVER_BASE = (0.0, 0.06, 0.25)
CORRECTING = 0.12


class Candidate(NamedTuple):
    """One of KINDS, and what an expert becomes; None where a layer has no such candidate."""

    kind: str
    plan: LayerPlan | None


def candidates(layer: LayerShape, count_E: Tensor) -> tuple[Candidate, ...]:
    """All candidates for a layer's experts, as many for every layer. `count_E` are the tokens of each expert: the one with the most
    is the base that others may share, as it is, and the mean over all by these counts is another."""
    return tuple(_candidates(layer, count_E))


def _candidates(layer: LayerShape, count_E: Tensor) -> Iterator[Candidate]:
    def of(kind: str, slot: Slot | None, *bases: Base) -> Candidate:
        return Candidate(kind, None if slot is None else LayerPlan(layer.name, (slot,) * layer.num_experts, bases))

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
    everybody = list(range(layer.num_experts))
    most_used = max(everybody, key=lambda e: (float(count_E[e]), -e))
    for base in (Base((most_used,), (1.0,)), Base(tuple(everybody), mass_weights(count_E, everybody))):
        for share, adapter in zip(OVER_BASE, _adapters(layer, OVER_BASE), strict=True):
            yield of("base", packed(4, SharedBase(0), *([adapter] if share else [])), base)
    yield of("constant", Slot((Constant(),)))
    yield of("nothing", NOTHING)
    yield of("drop", None if layer.refuse_dropping or layer.num_groups > 1 else DROPPED)


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
