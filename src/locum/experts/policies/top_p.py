"""Top-p: as many of the selected experts run as it takes for their weights to exceed p.

The experts of a token in the order of their weights, S the smallest prefix of them with

    sum over S of w_i > p W

or all of them, where no prefix exceeds it: top-k is the cap (dynamic routing, arXiv 2403.07652). W says whose share it is:

    selected      of all K weights: W is their sum, whatever the router (for models that were trained with top-k)
    all           of all experts: W = 1, and weights are the probabilities that a router which does not renormalise gives
                  (the paper's own rule)

Weights stay as the model makes them (the paper), or are scaled so that they sum to what all K summed to (`renormalise`).

Letters: T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PlanError, unknown
from ...shapes import LayerShape
from .policy import Counts, Policy, Routed, check_average, check_number, policy, run_only, size

SHARES = ("selected", "all")
MOST = 1000  # p of more than 1 runs all experts; some routers scale their weights


@policy("top_p")
@dataclass(frozen=True)
class TopP(Policy):
    """The smallest prefix of a token's experts whose weights exceed a share p runs."""

    p: float
    of: str = "selected"  # one of SHARES
    renormalise: bool = False  # weights are scaled to the sum of all selected ones
    mean: float = 0.0  # experts that ran for a token of the calibration text; 0: not known

    def check(self, where: str, shape: LayerShape | None) -> None:
        check_number(where, "p", self.p, MOST)
        check_average(where, self.mean, shape)
        if self.of not in SHARES:
            raise PlanError(f"{where}: {unknown('share', str(self.of), SHARES)}")
        if type(self.renormalise) is not bool:
            raise PlanError(f"{where} has renormalise {self.renormalise!r}; it must be true or false")
        if shape is not None and self.of == "all" and shape.renormalised:
            raise PlanError(
                f"{where} takes p of all experts, but this router divides the weights of those that it selects by their sum, so "
                f"there are no probabilities of all; take it of those selected"
            )

    def most(self, top_k: int) -> int:
        return top_k

    def average(self, top_k: int) -> float:
        return min(self.mean or top_k, top_k)

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        """Equal weights: the earlier of the K goes first."""
        sorted_TK, order_TK = torch.sort(size(weight_TK), dim=1, descending=True, stable=True)
        sums_TK = sorted_TK.cumsum(dim=1)
        whole_T1 = sums_TK[:, -1:] if self.of == "selected" else 1.0
        runs_TK = torch.ones_like(order_TK, dtype=torch.bool)
        runs_TK[:, 1:] = sums_TK[:, :-1] <= self.p * whole_T1  # those before an expert do not exceed p yet
        runs_TK = torch.empty_like(runs_TK).scatter_(1, order_TK, runs_TK)
        return run_only(runs_TK, index_TK, weight_TK, x_TD, self.renormalise)

    def __str__(self) -> str:
        said = f"top-p {self.p:g} of {self.of}" + ", weights renormalised" * self.renormalise
        return f"{said}, {self.mean:.2f} on average" if self.mean else said
