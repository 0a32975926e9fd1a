"""Narrowed: an expert of its own weights with fewer columns, the ones that score highest (CAMERA, arXiv 2508.02322).

A column is one number of the hidden state: a row of gate and up, with their biases, and a column of down. So a narrowed expert
computes what the whole one does with its other columns of down at zero. Its hidden units are fewer than those of other parts,
so it stands alone. Where pairs go all at once, its products lie in the first places of the width that others need; a routing
policy's vectors for `down` are used as far as it is wide.

Letters: P pairs (token, expert), Q pairs of one expert, T tokens, D model width, F expert width, G 2F with a gate and F without.
What a narrowed expert has of its own is named by the same letters, with the columns that it kept for F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import PlanError, unknown
from ...kernels.grouped import pick
from ...kernels.products import Products
from ..columns import COLUMNS, highest
from ..weights import permute_hidden
from .own_weights import OwnWeights, add_second_bias, rows_of, whole_row
from .part import Part, Place, Site, Sizes, part


class _Narrow(NamedTuple):
    """The sizes of a layer whose experts were so wide."""

    hidden_size: int
    expert_width: int
    has_gate: bool
    has_bias: bool


@part("narrowed")
@dataclass(frozen=True)
class Narrowed(Part):
    """The expert's own weights, of its `width` best columns."""

    width: int
    by: str = "camera"  # one of COLUMNS

    legend = "narrowed"
    plural = "narrowed experts"
    prefix = "narrowed.{}."
    has_biases = True
    is_narrow = True
    stands_alone = True
    trains = "with bases"
    at_once = True
    has_products = True
    sees: ClassVar[Mapping[str, str]] = {"gate_up_NGD": "up_FD"}  # down's inputs are fewer than what is known of them

    def check(self, place: Place) -> None:
        if self.by not in COLUMNS:
            raise PlanError(f"{place.where}: {unknown('score of columns', str(self.by), COLUMNS)}")
        most = place.shape.expert_width - 1
        if type(self.width) is not int or not 1 <= self.width <= most:
            raise PlanError(
                f"{place.where} is narrowed to {self.width!r} columns; allowed: 1 to {most}, fewer than its "
                f"{place.shape.expert_width}"
            )
        if len(place.parts) > 1:
            place.refuse_beside(self, "is narrowed")

    def needs(self) -> tuple[str, ...]:
        return COLUMNS[self.by].needs

    def variant(self) -> tuple[int, ...]:
        return (self.width,)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        (width,) = variant
        return OwnWeights.tensors((), _Narrow(sizes.hidden_size, width, sizes.has_gate, sizes.has_bias))

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        if len(variant) == 1 and type(variant[0]) is int and 1 <= variant[0] < sizes.expert_width:
            return ""
        return f"widths {list(variant)} are not below that of whole experts, {sizes.expert_width}"

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        columns = highest(COLUMNS[self.by].scores(site.statistics)[e], self.width)
        old = site.original(e)
        return rows_of(permute_hidden(old, columns.to(old.up_FD.device)))

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return OwnWeights.first(row, inputs)

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor:
        return OwnWeights.second(row, hidden_QF, weight_Q1)

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
        for half, (narrow, wide) in enumerate(_halves(stack, pre_PG.shape[1])):
            way.add(pre_PG[:, wide], inputs[min(half, len(inputs) - 1)], stack.gate_up_NGD[:, narrow], row_P, token_P)

    @classmethod
    def add_first_bias(cls, pre_PG: Tensor, stack: nn.Module, row_P: Tensor) -> None:
        if hasattr(stack, "gate_up_bias_NG"):
            bias_PG = pick(stack.gate_up_bias_NG, row_P)
            for narrow, wide in _halves(stack, pre_PG.shape[1]):
                pre_PG[:, wide] += bias_PG[:, narrow]

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
        way.scatter(total_TD, hidden_PF[:, : stack.down_NDF.shape[2]], stack.down_NDF, row_P, token_P)

    @classmethod
    def add_second_bias(
        cls, total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor
    ) -> None:
        add_second_bias(total_TD, token_P, weight_P1, stack, row_P)

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """With columns of zeros behind those that are there."""
        found = whole_row(row)
        width = found["down_DF"].shape[1]
        for name in ("gate_up_GD", "gate_up_bias_G"):
            if name in found:
                halves = found[name].split(width)
                zeros = [half.new_zeros(sizes.expert_width - width, *half.shape[1:]) for half in halves]
                found[name] = torch.cat([x for pair in zip(halves, zeros, strict=True) for x in pair])
        found["down_DF"] = torch.nn.functional.pad(found["down_DF"], (0, sizes.expert_width - width))
        return found

    def __str__(self) -> str:
        return f"{self.width} columns ({self.by})"

    def mark(self) -> str:
        return "n"

    def colour(self) -> str:
        return "fr"

    def order(self) -> tuple[int, ...]:
        return (-self.width,)


def _halves(stack: nn.Module, pre_width: int) -> list[tuple[slice, slice]]:
    """Where gate (if there is one) and up lie: among the rows of the first product, and among its places for all parts."""
    width = stack.down_NDF.shape[2]
    count = stack.gate_up_NGD.shape[1] // width
    wide = pre_width // count
    return [(slice(i * width, (i + 1) * width), slice(i * wide, i * wide + width)) for i in range(count)]
