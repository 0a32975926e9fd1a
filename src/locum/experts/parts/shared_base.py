"""Shared base: the weighted mean of some experts, which several experts of a layer use (LightMoE, arXiv 2603.12645)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import PlanError
from .own_weights import OwnWeights, rows_of
from .part import Part, Place, Site, Sizes, part

COLOURS = 8  # classes b0 to b7 of the report's style sheet


@part("shared_base")
@dataclass(frozen=True)
class SharedBase(Part):
    """One of the layer's bases; its row lies among own weights, behind them, and is stored once."""

    base: int

    legend = "shared base"
    plural = "shared bases"
    prefix = OwnWeights.prefix
    is_whole = True
    has_biases = True
    trains = "with bases"
    sees = OwnWeights.sees

    @property
    def stack(self) -> type[Part]:
        return OwnWeights

    def check(self, place: Place) -> None:
        if type(self.base) is not int or not 0 <= self.base < place.num_bases:
            raise PlanError(
                f"{place.where} uses base {self.base!r}; the layer has {place.num_bases} bases, numbered from 0"
            )

    def row(self, e: int) -> tuple[int, ...]:
        return (1, self.base)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return OwnWeights.tensors(variant, sizes)

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        return rows_of(site.base(self.base))

    def __str__(self) -> str:
        return f"base {self.base}"

    def mark(self) -> str:
        return chr(ord("A") + self.base) if self.base < 26 else str(self.base)

    def colour(self) -> str:
        return f"b{self.base % COLOURS}"

    def order(self) -> tuple[int, ...]:
        return (self.base,)
