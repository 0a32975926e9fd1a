"""Constant: an expert's mean output on the calibration tokens stands in for it (MoNE, arXiv 2507.00390)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...kernels.grouped import pick
from ...stats.sums import mean_output
from .part import Part, Site, Sizes, part


@part("constant")
@dataclass(frozen=True)
class Constant(Part):
    """The expert's mean output, before the router weight; zero for an expert that no token selected."""

    legend = "constant"
    plural = "constants in place of experts"
    as_weights = False
    prefix = ""
    changes_weights = False
    trains = "with bases"
    linear = ("constant_ND",)
    at_once = True

    def needs(self) -> tuple[str, ...]:
        return ("output_sum", "count")

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"constant_ND": (sizes.hidden_size,)}

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        return {"constant_ND": mean_output(site.statistics)[e].to(site.original(e).down_DF)}

    @classmethod
    def output(cls, row: Mapping[str, Tensor]) -> Tensor:
        return row["constant_ND"]

    @classmethod
    def add_output(cls, total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor) -> None:
        constant_PD = pick(stack.constant_ND, row_P).to(total_TD.dtype)
        total_TD.index_add_(0, token_P, constant_PD * weight_P1.to(total_TD.dtype))

    @classmethod
    def multiplied(cls, leaf: str) -> bool:
        return False

    def __str__(self) -> str:
        return "constant"

    def colour(self) -> str:
        return "fc"
