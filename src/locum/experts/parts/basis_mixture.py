"""Mixture of basis experts: gate and up are a factor of the expert's own times a mixture of bases that many share (MoBE, arXiv
2508.05257). Down stays as it is.

The bases are a part that no plan names: they come with the mixtures, one bank for all experts of the same rank and number of bases.

Letters: Q pairs of one expert, D model width, F expert width, R rank, M bases, J rows of all bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...errors import PlanError
from ..mixtures import Mixture, fit_mixture
from .part import Part, Place, Site, Sizes, part


def _fault(variant: tuple[int, ...], sizes: Sizes) -> str:
    limit = min(sizes.hidden_size, sizes.expert_width)
    is_right = len(variant) == 2 and all(type(n) is int and n >= 1 for n in variant) and variant[1] <= limit
    return "" if is_right else f"mixtures {list(variant)} do not fit {sizes.hidden_size} x {sizes.expert_width} weights"


@part("basis_bank")
@dataclass(frozen=True)
class BasisBank(Part):
    """So many bases of one rank, for gate and for up. By itself it computes nothing."""

    bases: int
    rank: int

    legend = "bases of mixtures"
    plural = "bases of mixtures"
    prefix = "bank.{}."
    follows = True
    trains = "with bases"
    has_products = True

    def variant(self) -> tuple[int, ...]:
        return (self.bases, self.rank)

    def row(self, e: int) -> tuple[int, ...]:
        return (0,)  # one for all

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        bases, rank = variant
        names = ("gate_bases_JD", "up_bases_JD") if sizes.has_gate else ("up_bases_JD",)
        return dict.fromkeys(names, (bases * rank, sizes.hidden_size))

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        return _fault(variant, sizes)

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        dtype = site.original(e).up_FD.dtype
        found = _fitted(self, site)
        return {f"{name}_bases_JD": mixture.bases_MRI.flatten(0, 1).to(dtype) for name, mixture in found.items()}

    def __str__(self) -> str:
        return f"{self.bases} bases of rank {self.rank}"


@part("basis_mixture")
@dataclass(frozen=True)
class BasisMixture(Part):
    """W = A sum_j mix_j B_j for gate and up, A and mix of the expert's own; its own down."""

    bases: int
    rank: int

    legend = "mixture of bases"
    plural = "mixtures of bases"
    prefix = "mixtures.{}."
    stands_alone = True
    shares = BasisBank.name
    has_products = True
    sees: ClassVar[Mapping[str, str]] = {"down_DF": "down_DF"}

    def check(self, place: Place) -> None:
        members = place.shape.num_experts
        if type(self.bases) is not int or not 1 <= self.bases <= members:
            raise PlanError(f"{place.where} mixes {self.bases!r} bases; allowed: 1 to {members}, the layer's experts")
        if reason := _fault(self.variant(), place.shape):
            raise PlanError(f"{place.where}: {reason}; the rank may be 1 to the smaller of the two")
        if any(part is not self and part.changes_weights for part in place.parts):
            place.refuse_beside(self, "is a mixture of bases")

    def variant(self) -> tuple[int, ...]:
        return (self.bases, self.rank)

    def beside(self) -> tuple[Part, ...]:
        return (BasisBank(self.bases, self.rank, format=self.format, quantiser=self.quantiser),)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        (bases, rank), f = variant, sizes.expert_width
        names = ("gate", "up") if sizes.has_gate else ("up",)
        own = {f"{name}_own_FR": (f, rank) for name in names} | {f"{name}_mix_M": (bases,) for name in names}
        return own | {"down_DF": (sizes.hidden_size, f)}

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        return _fault(variant, sizes)

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        (bank,), down_DF = self.beside(), site.original(e).down_DF
        place, row = site.members(self).index(e), {"down_DF": down_DF}
        for name, mixture in _fitted(bank, site).items():
            row[f"{name}_own_FR"] = mixture.own_EOR[place].to(down_DF.dtype)
            row[f"{name}_mix_M"] = mixture.mix_EM[place].to(down_DF.dtype)
        return row

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        halves = [
            linear(linear(inputs[min(i, len(inputs) - 1)], _mixed(row, name)), row[f"{name}_own_FR"])
            for i, name in enumerate(_names(row))
        ]
        return torch.cat(halves, dim=1)

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor:
        return linear(hidden_QF, row["down_DF"])

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        wide = {leaf: tensor.float() for leaf, tensor in row.items()}
        first = [wide[f"{name}_own_FR"] @ _mixed(wide, name) for name in _names(row)]
        return {"gate_up_GD": torch.cat(first), "down_DF": wide["down_DF"]}

    @classmethod
    def multiplied(cls, leaf: str) -> bool:
        return "mix" not in leaf

    def __str__(self) -> str:
        return f"mixture of {self.bases} bases, rank {self.rank}"

    def mark(self) -> str:
        return "x"

    def colour(self) -> str:
        return "fr"


def _names(row: Mapping[str, Tensor]) -> tuple[str, ...]:
    return ("gate", "up") if "gate_mix_M" in row else ("up",)


def _mixed(row: Mapping[str, Tensor], name: str) -> Tensor:
    """[R, D] what the expert's mixture of the bases is."""
    mix_M, bases_JD = row[f"{name}_mix_M"], row[f"{name}_bases_JD"]
    return (mix_M[None] @ bases_JD.reshape(len(mix_M), -1)).view(-1, bases_JD.shape[1])


def _fitted(bank: BasisBank, site: Site) -> dict[str, Mixture]:
    """The mixtures that gate (where there is one) and up of the experts become that share the bank, fitted together."""
    experts = site.members(bank)

    def fitted() -> dict[str, Mixture]:
        has_gate = site.original(experts[0]).gate_FD is not None
        return {name: one_of(name) for name in (("gate", "up") if has_gate else ("up",))}

    def one_of(name: str) -> Mixture:
        stacked = torch.stack([getattr(site.original(e), f"{name}_FD") for e in experts])
        return fit_mixture(stacked, bank.rank, bank.bases)

    return site.once(bank, fitted)
