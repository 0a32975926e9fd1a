"""A part of another package: a vector added to the first product of an expert, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from locum.errors import PlanError
from locum.experts.parts.part import Part, Place, Site, Sizes, part


@part("shift")
@dataclass(frozen=True)
class Shift(Part):
    """gate_up x + v in place of gate_up x, with v drawn from N(0, scale^2)."""

    scale: float = 0.1

    legend = "shift"
    plural = "shifts of first products"
    prefix = "shifts.{}."
    as_weights = False

    def check(self, place: Place) -> None:
        if not self.scale > 0:
            raise PlanError(f"{place.where} has a shift of scale {self.scale!r}; allowed: more than 0")

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"shift_NG": (sizes.expert_width * (2 if sizes.has_gate else 1),)}

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        weight_GD = site.original(e).gate_up_GD
        drawn_G = torch.randn(len(weight_GD), generator=site.generator) * self.scale
        return {"shift_NG": drawn_G.to(weight_GD)}

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return row["shift_NG"].expand(len(inputs[0]), -1)

    @classmethod
    def multiplied(cls, leaf: str) -> bool:
        return False

    def __str__(self) -> str:
        return f"shift ({self.scale:g})"
