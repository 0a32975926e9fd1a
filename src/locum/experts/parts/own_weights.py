"""Own weights: the expert is kept as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels.grouped import add_halves, pick
from ...kernels.products import Products
from ..weights import ExpertWeights
from .part import Part, Place, Site, Sizes, part


@part("own_weights")
@dataclass(frozen=True)
class OwnWeights(Part):
    """The expert's own gate, up and down weights, and its biases where the family has them."""

    legend = "kept"
    plural = "whole experts"
    prefix = "dense."
    is_whole = True
    has_biases = True
    trains = "never"
    at_once = True
    has_products = True
    sees: ClassVar[Mapping[str, str]] = {"gate_up_NGD": "up_FD", "down_NDF": "down_DF"}

    def check(self, place: Place) -> None:
        if len(place.parts) > 1 and not self.format:  # in few bits, others may correct them
            place.refuse_beside(self, "keeps its own weights")

    def row(self, e: int) -> tuple[int, ...]:
        return (0, e)  # in front of the bases, which lie in the same stack

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        d, f = sizes.hidden_size, sizes.expert_width
        g = f * (2 if sizes.has_gate else 1)
        biases = {"gate_up_bias_NG": (g,), "down_bias_ND": (d,)} if sizes.has_bias else {}
        return {"gate_up_NGD": (g, d), "down_NDF": (d, f)} | biases

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        return rows_of(site.original(e))

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return first_product(inputs, row["gate_up_NGD"], row.get("gate_up_bias_NG"))

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor:
        product_QD = linear(hidden_QF, row["down_NDF"])
        bias_D = row.get("down_bias_ND")
        return product_QD if bias_D is None else product_QD + weight_Q1.to(bias_D.dtype) * bias_D

    @classmethod
    def add_first(
        cls,
        way: Products,
        pre_PG: Tensor,
        inputs: tuple[Tensor, ...],
        token_P: Tensor,
        stack: nn.Module,
        row_P: Tensor,
        each_P: Tensor,
    ) -> None:
        add_halves(way, pre_PG, inputs, token_P, stack.gate_up_NGD, row_P)

    @classmethod
    def add_first_bias(cls, pre_PG: Tensor, stack: nn.Module, row_P: Tensor) -> None:
        add_first_bias(pre_PG, stack, row_P)

    @classmethod
    def add_second(
        cls,
        way: Products,
        total_TD: Tensor,
        hidden_PF: Tensor,
        token_P: Tensor,
        stack: nn.Module,
        row_P: Tensor,
        each_P: Tensor,
    ) -> None:
        way.scatter(total_TD, hidden_PF, stack.down_NDF, row_P, token_P)

    @classmethod
    def add_second_bias(
        cls, total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor
    ) -> None:
        add_second_bias(total_TD, token_P, weight_P1, stack, row_P)

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        return whole_row(row)

    def __str__(self) -> str:
        return "kept"

    def mark(self) -> str:
        return ""

    def colour(self) -> str:
        return "fk"


def rows_of(weights: ExpertWeights) -> dict[str, Tensor]:
    """An expert's weights under the names of a stack of them."""
    row = {"gate_up_NGD": weights.gate_up_GD, "down_NDF": weights.down_DF}
    if weights.up_bias_F is not None:
        row |= {"gate_up_bias_NG": weights.gate_up_bias_G, "down_bias_ND": weights.down_bias_D}
    return row


def weights_of(row: Mapping[str, Tensor], has_gate: bool) -> ExpertWeights:
    """An expert's weights from their names in a stack of them."""

    def split(first: Tensor) -> tuple[Tensor | None, Tensor]:
        return (first[: len(first) // 2], first[len(first) // 2 :]) if has_gate else (None, first)

    weights = (*split(row["gate_up_NGD"]), row["down_NDF"])
    if "down_bias_ND" not in row:
        return ExpertWeights(*weights)
    return ExpertWeights(*weights, *split(row["gate_up_bias_NG"]), row["down_bias_ND"])


def whole_row(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of whole weights, in float32."""
    names = {
        "gate_up_NGD": "gate_up_GD",
        "down_NDF": "down_DF",
        "gate_up_bias_NG": "gate_up_bias_G",
        "down_bias_ND": "down_bias_D",
    }
    return {names[leaf]: tensor.float() for leaf, tensor in row.items()}


def first_product(inputs: tuple[Tensor, ...], weight_GD: Tensor, bias_G: Tensor | None = None) -> Tensor:
    """The first product: of the one input, or of gate's half with the first input and up's with the second."""
    if len(inputs) == 1:
        return linear(inputs[0], weight_GD, bias_G)
    biases = (None, None) if bias_G is None else bias_G.chunk(2)
    halves = zip(inputs, weight_GD.chunk(2), biases, strict=True)
    return torch.cat([linear(*half) for half in halves], dim=1)


def add_first_bias(pre_PG: Tensor, stack: nn.Module, row_P: Tensor) -> None:
    """Add the stack's first biases, where it has any."""
    if hasattr(stack, "gate_up_bias_NG"):
        pre_PG += pick(stack.gate_up_bias_NG, row_P)


def add_second_bias(total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor) -> None:
    """Add the stack's second biases times the router weights, where it has any."""
    if hasattr(stack, "down_bias_ND"):
        bias_PD = pick(stack.down_bias_ND, row_P).to(total_TD.dtype) * weight_P1.to(total_TD.dtype)
        total_TD.index_add_(0, token_P, bias_PD)
