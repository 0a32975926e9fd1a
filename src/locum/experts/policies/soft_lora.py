"""A soft mixture of low-rank experts beside the experts that run (Omni-SMoLA, arXiv 2312.00968).

    y(x) = experts(x) + sum over e of softmax(Phi x)_e B_e A_e x

Every token uses all of these small experts, each with its share. Which of the layer's own experts run does not change. Stored
tensors start at zero, so that the layer computes what it did before; with B at zero it does so whatever A and Phi are.

Differs from the paper, whose formulas are those of Soft MoE: there a small expert gets a mixture of all of a sequence's tokens. In a
model that predicts the next token a mixture would tell of later ones, and in generation with a cache there is one token at a
time. So here a token is mixed with no other: every small expert gets the token itself.

Letters: T tokens, N stacked items (the small experts), R rank, D model width, K top-k, X numbers of all ranks together (N R).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import PlanError
from ...shapes import LayerShape
from .policy import Counts, Policy, Routed, policy, wide

PHI, DOWN, UP = "soft_phi_ND", "soft_A_NRD", "soft_B_NDR"  # their names in a container


@policy("soft_lora")
@dataclass(frozen=True)
class SoftLora(Policy):
    """Low-rank experts beside the layer's own, softly mixed for every token."""

    experts: int  # how many
    rank: int

    def check(self, where: str, shape: LayerShape | None) -> None:
        _check_count(where, "experts", self.experts, None)
        _check_count(where, "rank", self.rank, None if shape is None else shape.hidden_size)

    def most(self, top_k: int) -> int:
        return top_k

    def tensors(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        n, r, d = self.experts, self.rank, counts.hidden_size
        return {PHI: (n, d), DOWN: (n, r, d), UP: (n, d, r)}

    def per_token(self, top_k: int) -> int:
        return self.experts

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        return Routed(index_TK, weight_TK, (x_TD,))

    def added(self, tensors: Mapping[str, Tensor], x_TD: Tensor) -> Tensor | None:
        phi_ND, down_NRD, up_NDR = (tensors[name].to(x_TD.dtype) for name in (PHI, DOWN, UP))
        share_TN1 = wide(x_TD @ phi_ND.T).softmax(dim=1).to(x_TD.dtype)[:, :, None]
        inner_TX = ((x_TD @ down_NRD.flatten(0, 1).T).unflatten(1, (self.experts, -1)) * share_TN1).flatten(1)
        return inner_TX @ up_NDR.transpose(1, 2).flatten(0, 1)

    def work(self, counts: Counts, index_TK: Tensor, routed: Routed) -> tuple[int, int]:
        numbers = self.experts * counts.hidden_size * (2 * self.rank + 1)
        return numbers, 2 * len(index_TK) * numbers

    def __str__(self) -> str:
        return f"{self.experts} soft experts of rank {self.rank} beside"


def _check_count(where: str, name: str, value: Any, most: int | None) -> None:
    if type(value) is not int or value < 1 or (most is not None and value > most):
        bounds = "whole numbers of 1 or more" if most is None else f"1 to {most}"
        raise PlanError(f"{where} has {name} {value!r}; allowed: {bounds}")
