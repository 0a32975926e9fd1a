"""A soft mixture of low-rank experts beside the experts that run (Omni-SMoLA, arXiv 2312.00968).

    y(x) = experts(x) + sum over e of softmax(Phi x)_e B_e A_e x

Every token uses all of these small experts, each with its share. Which of the layer's own experts run does not change. Stored
tensors start at zero, so that the layer computes what it did before; with B at zero it does so whatever A and Phi are.

A layer may have several such sets, each with a name and a size of its own. They add up, and none reads another's tensors.

Differs from the paper, whose formulas are those of Soft MoE: there a small expert gets a mixture of all of a sequence's tokens. In a
model that predicts the next token a mixture would tell of later ones, and in generation with a cache there is one token at a
time. So here a token is mixed with no other: every small expert gets the token itself. There a set serves the tokens of one
modality; here all sets serve all tokens, since a text's tokens do not say its domain.

Letters: T tokens, N stacked items (the small experts), R rank, D model width, K top-k, X numbers of all ranks together (N R).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import PlanError
from ...shapes import LayerShape
from .policy import Counts, Policy, Routed, policy, wide

# Their names in a container; of a set with a name they end with it.
PHI, DOWN, UP = "soft_phi_ND", "soft_A_NRD", "soft_B_NDR"
NAME = re.compile("[A-Za-z0-9_-]{0,64}")


@policy("soft_lora")
@dataclass(frozen=True)
class SoftLora(Policy):
    """Low-rank experts beside the layer's own, softly mixed for every token."""

    only_adds: ClassVar[bool] = True
    experts: int  # how many
    rank: int
    set: str = ""  # its name; one set of a layer needs none

    @property
    def place(self) -> str:
        return f"{self.name} {self.set}".rstrip()

    @property
    def leaves(self) -> tuple[str, str, str]:
        """The names of Phi, A and B in a container."""
        end = f"_{self.set}" if self.set else ""
        return PHI + end, DOWN + end, UP + end

    def check(self, where: str, shape: LayerShape | None) -> None:
        _check_count(where, "experts", self.experts, None)
        _check_count(where, "rank", self.rank, None if shape is None else shape.hidden_size)
        if reason := name_fault(self.set):
            raise PlanError(f"{where} has a {reason}")

    def most(self, top_k: int) -> int:
        return top_k

    def tensors(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        n, r, d = self.experts, self.rank, counts.hidden_size
        phi, down, up = self.leaves
        return {phi: (n, d), down: (n, r, d), up: (n, d, r)}

    def per_token(self, top_k: int) -> int:
        return self.experts

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        return Routed(index_TK, weight_TK, (x_TD,))

    def added(self, tensors: Mapping[str, Tensor], x_TD: Tensor) -> Tensor | None:
        phi_ND, down_NRD, up_NDR = (tensors[name].to(x_TD.dtype) for name in self.leaves)
        share_TN1 = wide(x_TD @ phi_ND.T).softmax(dim=1).to(x_TD.dtype)[:, :, None]
        inner_TX = ((x_TD @ down_NRD.flatten(0, 1).T).unflatten(1, (self.experts, -1)) * share_TN1).flatten(1)
        return inner_TX @ up_NDR.transpose(1, 2).flatten(0, 1)

    def work(self, counts: Counts, index_TK: Tensor, routed: Routed) -> tuple[int, int]:
        numbers = self.experts * counts.hidden_size * (2 * self.rank + 1)
        return numbers, 2 * len(index_TK) * numbers

    def to_json(self) -> dict[str, Any]:
        said = super().to_json()
        return said if self.set else {name: value for name, value in said.items() if name != "set"}

    def __str__(self) -> str:
        return f"{self.experts} soft experts of rank {self.rank} beside" + (f", set {self.set}" if self.set else "")


def name_fault(name: Any) -> str:
    """What is wrong with the name of a set, if anything."""
    if isinstance(name, str) and NAME.fullmatch(name):
        return ""
    return f"set called {name!r:.100}; allowed: names of up to 64 letters, digits, - and _"


def _check_count(where: str, name: str, value: Any, most: int | None) -> None:
    if type(value) is not int or value < 1 or (most is not None and value > most):
        bounds = "whole numbers of 1 or more" if most is None else f"1 to {most}"
        raise PlanError(f"{where} has {name} {value!r}; allowed: {bounds}")
