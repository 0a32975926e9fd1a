"""What becomes of the experts of one layer: a slot for each of them, the bases that they share, a routing policy.

Letters: E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..experts.parts.constant import Constant
from ..experts.parts.low_rank import LowRank
from ..experts.parts.own_biases import OwnBiases
from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.part import Part
from ..experts.parts.shared_base import SharedBase
from ..experts.policies.policy import Policy
from ..formats.rows import is_packed, stored_shape
from ..shapes import LayerShape, ModelShape

StackKey = tuple[type[Part], tuple[int, ...], str]  # a kind of part, the variant, and the number format


@dataclass(frozen=True)
class Slot:
    """What becomes of one expert."""

    parts: tuple[Part, ...] = ()
    survives: bool = True  # False: its router row goes too

    @property
    def is_kept(self) -> bool:
        """Whether it keeps its own weights and nothing else, in whatever number format."""
        return self.survives and [type(part) for part in self.parts] == [OwnWeights]

    @property
    def is_untouched(self) -> bool:
        """Whether it keeps them as they are."""
        return self.survives and self.parts == (OwnWeights(),)

    @property
    def is_rewritten(self) -> bool:
        """Whether its own weights are changed where they lie, and nothing else."""
        return self.survives and len(self.parts) == 1 and self.parts[0].in_place

    @property
    def is_replaced(self) -> bool:
        """Whether something else, or nothing, stands in its place."""
        return self.survives and not self.is_kept

    @property
    def fades(self) -> bool:
        """Whether old weights can fade out beside what stands in their place."""
        return self.is_replaced and not self.is_rewritten and not any(part.is_narrow for part in self.parts)

    @property
    def base(self) -> int | None:
        """The number of the base that it uses, if any."""
        return next((part.base for part in self.parts if isinstance(part, SharedBase)), None)

    def on_base(self, index: int) -> Slot:
        """The same on the base of another number."""
        parts = (replace(part, base=index) if isinstance(part, SharedBase) else part for part in self.parts)
        return replace(self, parts=tuple(parts))

    @property
    def fate(self) -> str:
        """What becomes of the expert in one word: kept, stand_in, nothing or dropped."""
        return "dropped" if not self.survives else "kept" if self.is_kept else "stand_in" if self.parts else "nothing"

    def all_parts(self, has_bias: bool) -> tuple[Part, ...]:
        """The parts with what no plan names: what comes with them, and the own biases of an expert none of whose parts has them."""
        weights = [part for part in self.parts if part.changes_weights]
        own = has_bias and weights and not any(part.has_biases for part in weights)
        more = tuple(more for part in self.parts for more in part.beside())
        return (*self.parts, *more, *([OwnBiases()] if own else []))

    def __str__(self) -> str:
        words = " + ".join(part.words() for part in self.parts)
        return f"{self.fate}: {words}" if self.fate == "stand_in" else words if self.is_kept else self.fate


KEPT, NOTHING, DROPPED = Slot((OwnWeights(),)), Slot(), Slot(survives=False)


def stand_in(
    base: int | None = None, rank: int = 0, start: str = "gaussian", constant: bool = False, *more: Part
) -> Slot:
    """A slot of the parts that come with Locum: a shared base, an adapter, a constant, in this order, and `more`."""
    based = [] if base is None else [SharedBase(base)]
    adapted = [LowRank(rank, start)] if rank else []
    return Slot((*based, *adapted, *([Constant()] if constant else []), *more))


MERGES = {
    "mean": (),
    "least-squares": ("input_sample",),
}  # ways to make a base of experts, with the statistics that each reads


@dataclass(frozen=True)
class Base:
    """One shared base: the weighted mean of some experts' weights (LightMoE Eq. 4).

    With `merge="least-squares"` its last product then gives, on sampled inputs, what is nearest to the weighted mean of the
    experts' outputs (experts/fitting.py).
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]  # at least 0, sum to one
    align: bool = False  # permute each expert's hidden units to the heaviest one's before averaging
    merge: str = "mean"  # one of MERGES

    def __str__(self) -> str:
        terms = [f"{weight:.6g} x expert {e}" for e, weight in zip(self.experts, self.weights, strict=True)]
        words = [", aligned"] * self.align + [f", {self.merge}"] * (self.merge != "mean")
        return " + ".join(terms) + "".join(words)


@dataclass(frozen=True)
class LayerPlan:
    """One layer: a slot for every expert, in the order of the original indices, and the bases they share."""

    layer: str
    slots: tuple[Slot, ...]
    bases: tuple[Base, ...] = ()
    routing: Policy | None = None  # None: every selected expert runs
    top_k: int | None = None  # experts that the router selects afterwards; None: as many as before
    dropped: bool = False  # with all experts its decoder layer goes, attention and norms too

    @classmethod
    def without(cls, shape: LayerShape) -> LayerPlan:
        """A layer whose whole decoder layer goes."""
        return cls(shape.name, (DROPPED,) * shape.num_experts, dropped=True)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Original indices of the experts that the router can still choose; their position is the new index."""
        return tuple(e for e, slot in enumerate(self.slots) if slot.survives)

    @property
    def replaced(self) -> tuple[int, ...]:
        return tuple(e for e, slot in enumerate(self.slots) if slot.is_replaced)

    @property
    def rewritten(self) -> tuple[int, ...]:
        """The experts whose own weights are changed where they lie."""
        return tuple(e for e, slot in enumerate(self.slots) if slot.is_rewritten)

    @property
    def fading(self) -> tuple[int, ...]:
        """The replaced experts whose old weights can fade out."""
        return tuple(e for e, slot in enumerate(self.slots) if slot.fades)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that building the layer reads."""
        of_bases = (name for base in self.bases for name in MERGES[base.merge])
        return tuple(dict.fromkeys((*(name for part in self.parts for name in part.reads()), *of_bases)))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every distinct part of the layer."""
        return tuple(dict.fromkeys(part for slot in self.slots for part in slot.parts))

    @property
    def is_identity(self) -> bool:
        return self.keeps_experts and self.routing is None and self.top_k is None

    @property
    def keeps_experts(self) -> bool:
        return all(slot.is_untouched for slot in self.slots)

    @property
    def is_dense(self) -> bool:
        """Whether a stock layer can hold it: every survivor has full weights of its own, and all selected ones run."""
        fit = (slot.is_untouched or slot.is_rewritten or not slot.survives for slot in self.slots)
        return self.routing is None and all(fit)

    def rows(self, has_bias: bool) -> dict[StackKey, dict[int, tuple[int, ...]]]:
        """For every stack that the layer needs, the key of the row that each expert uses. Equal keys are one row."""
        rows: dict[StackKey, dict[int, tuple[int, ...]]] = {}
        for e in self.survivors:
            for part in self.slots[e].all_parts(has_bias):
                rows.setdefault((part.stack, part.variant(), part.format), {})[e] = part.row(e)
        return rows

    def parameters(self, shape: LayerShape) -> int:
        """Parameters of the routed experts afterwards, everything that a policy stores included."""
        total = self.policy_parameters(shape)
        for (kind, variant, _), row_of in self.rows(shape.has_bias).items():
            one = sum(math.prod(size) for size in kind.tensors(variant, shape).values())
            total += len(set(row_of.values())) * one
        return total

    def bytes(self, layer: LayerShape, shape: ModelShape) -> int:
        """Bytes of the same: experts' own weights stay as the checkpoint has them, what has a format is as that says, all else
        takes the dtype of stand-ins."""
        own = sum(OwnWeights() in self.slots[e].parts for e in self.survivors)
        rest, packed = self.parameters(layer) - own * layer.parameters(), 0
        for (kind, variant, format), row_of in self.rows(layer.has_bias).items():
            count = len(set(row_of.values()))
            for size in kind.tensors(variant, layer).values():
                if is_packed(format, size):
                    rest -= count * math.prod(size)
                    packed += count * math.prod(stored_shape(format, size))
        return own * shape.bytes_of_expert(layer) + rest * shape.expert_itemsize + packed

    def policy_parameters(self, shape: LayerShape) -> int:
        if self.routing is None:
            return 0
        sizes = self.routing.tensors(replace(shape, num_experts=len(self.survivors)))
        return sum(math.prod(size) for size in sizes.values())
