"""Own biases: what an expert without whole weights keeps of the original, where the family has biases.

No plan names it: a slot whose parts change weights but bring none that are whole has it in families with biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .own_weights import add_first_bias, add_second_bias, rows_of, whole_row
from .part import Part, Site, Sizes, part


@part("own_biases")
@dataclass(frozen=True)
class OwnBiases(Part):
    """The biases of the expert that is stood in for."""

    legend = "own biases"
    plural = "own biases"
    prefix = "biases."
    follows = True
    trains = "never"
    at_once = True

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        g = sizes.expert_width * (2 if sizes.has_gate else 1)
        return {"gate_up_bias_NG": (g,), "down_bias_ND": (sizes.hidden_size,)}

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        return {leaf: tensor for leaf, tensor in rows_of(site.original(e)).items() if "bias" in leaf}

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return row["gate_up_bias_NG"].expand(len(inputs[0]), -1)

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor:
        bias_D = row["down_bias_ND"]
        return weight_Q1.to(bias_D.dtype) * bias_D

    @classmethod
    def add_first_bias(cls, pre_PG: Tensor, stack: nn.Module, row_P: Tensor) -> None:
        add_first_bias(pre_PG, stack, row_P)

    @classmethod
    def add_second_bias(
        cls, total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor
    ) -> None:
        add_second_bias(total_TD, token_P, weight_P1, stack, row_P)

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        return whole_row(row)

    def __str__(self) -> str:
        return "own biases"
