"""Low-rank factors of which several experts share the one that reads their inputs (MoE-SVD, ICML 2025): W = U V, V shared.

V is that of one expert; U is fitted to it by least squares over the inputs that each expert saw, so what is lost is what that
expert's directions cannot say. Several experts may share U too: the mean of those of some experts.

The shared factor is a part that no plan names: it comes with the factors that read from it.

Letters: D model width, F expert width, R rank, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PlanError, unknown
from ..factors import refitted, svd_factors, whitened_factors
from .low_rank import LowRank
from .part import Part, Place, Site, Sizes, part

STARTS = {"svd": (), "whitened": ("input_gram", "hidden_gram")}  # where V is from, with the statistics that it reads
JITTER = 1e-6  # of the inputs' mean square: directions that no token saw count for so little


@part("right_factors")
@dataclass(frozen=True)
class RightFactors(Part):
    """V of one expert, for gate, up and down. By itself it computes nothing."""

    rank: int
    right: int
    start: str = "whitened"

    legend = "shared factor of inputs"
    plural = "shared factors of inputs"
    prefix = "right.{}."
    follows = True
    trains = "with bases"
    has_products = True

    def variant(self) -> tuple[int, ...]:
        return (self.rank,)

    def row(self, e: int) -> tuple[int, ...]:
        return (self.right,)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {leaf: size for leaf, size in LowRank.tensors(variant, sizes).items() if "_A" in leaf}

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        return LowRank.variant_fault(variant, sizes)

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        found = self.factors(site)
        first = torch.cat([found[name] for name in ("gate_FD", "up_FD") if name in found])
        return {"gate_up_A": first, "down_A_RF": found["down_DF"]}

    def factors(self, site: Site) -> dict[str, Tensor]:
        """[R, I] V for each weight, in the dtype of the weights."""

        def made() -> dict[str, Tensor]:
            old = site.original(self.right)
            grams = site.input_grams(self.right) if STARTS[self.start] else {}
            matrices = {name: getattr(old, name) for name in ("gate_FD", "up_FD", "down_DF")}
            return {name: self._factor(w_OI, grams.get(name)) for name, w_OI in matrices.items() if w_OI is not None}

        return site.once(self, made)

    def _factor(self, w_OI: Tensor, gram_II: Tensor | None) -> Tensor:
        wide_OI = w_OI.float()
        found = svd_factors(wide_OI, self.rank) if gram_II is None else whitened_factors(wide_OI, gram_II, self.rank)
        return found[0].to(w_OI.dtype)

    def __str__(self) -> str:
        return f"V of expert {self.right}, rank {self.rank} ({self.start})"


@part("left_factors")
@dataclass(frozen=True)
class LeftFactors(Part):
    """W = U V for gate, up and down: V that of the expert `right`, U the mean of those that the experts `of` have for it."""

    rank: int
    right: int
    of: tuple[int, ...]
    start: str = "whitened"  # of V

    legend = "low rank, inputs' factor shared"
    plural = "low-rank stand-ins with a shared factor"
    prefix = "left.{}."
    stands_alone = True
    shares = RightFactors.name
    has_products = True

    def check(self, place: Place) -> None:
        if self.start not in STARTS:
            raise PlanError(f"{place.where}: {unknown('start', str(self.start), STARTS)}")
        if reason := self.variant_fault(self.variant(), place.shape):
            raise PlanError(f"{place.where}: {reason}")
        count = place.shape.num_experts
        if not self.of or any(type(e) is not int or not 0 <= e < count for e in (self.right, *self.of)):
            raise PlanError(
                f"{place.where} has factors of experts {list(self.of)} for that of {self.right!r}; allowed: 0 to {count - 1}, and "
                f"at least one"
            )
        if any(part is not self and part.changes_weights for part in place.parts):
            place.refuse_beside(self, "has low-rank factors of its own")

    def needs(self) -> tuple[str, ...]:
        return STARTS[self.start]

    def variant(self) -> tuple[int, ...]:
        return (self.rank,)

    def row(self, e: int) -> tuple[int, ...]:
        return (self.right, *self.of)

    def beside(self) -> tuple[Part, ...]:
        return (RightFactors(self.rank, self.right, self.start, format=self.format, quantiser=self.quantiser),)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {leaf: size for leaf, size in LowRank.tensors(variant, sizes).items() if "_B" in leaf}

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        return LowRank.variant_fault(variant, sizes)

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        ((shared,), leaves) = self.beside(), {"gate_FD": "gate_B_FR", "up_FD": "up_B_FR", "down_DF": "down_B_DR"}
        right, total = shared.factors(site), {}
        for i in self.of:
            old = site.original(i)
            grams = site.input_grams(i) if STARTS[self.start] else {}
            for name, a_RI in right.items():
                total[name] = total.get(name, 0) + _fitted(getattr(old, name), a_RI, grams.get(name))
        return {leaves[name]: (u_OR / len(self.of)).to(right[name].dtype) for name, u_OR in total.items()}

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return LowRank.first(row, inputs)

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor:
        return LowRank.second(row, hidden_QF, weight_Q1)

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        return LowRank.whole(row, sizes)

    def __str__(self) -> str:
        named = " and ".join(map(str, self.of))
        return f"U of {named} on V of {self.right}, rank {self.rank} ({self.start})"

    def mark(self) -> str:
        return "u"

    def colour(self) -> str:
        return "fr"

    def order(self) -> tuple[int, ...]:
        return (-self.rank, self.right, *self.of)


def _fitted(w_OI: Tensor, a_RI: Tensor, gram_II: Tensor | None) -> Tensor:
    """[O, R] float64: the U for which U V comes nearest to W on the inputs; on all alike, where none are known."""
    w_OI, seen_RI = w_OI.double(), None
    scale = 0.0 if gram_II is None else float(gram_II.diagonal().mean())
    if scale > 0:
        seen_RI = a_RI.double() @ (gram_II.to(w_OI) + torch.eye(len(gram_II)).to(w_OI) * (JITTER * scale))
    return refitted(w_OI, torch.eye(w_OI.shape[1]).to(w_OI), a_RI, seen_RI)
