"""Skipping: of the selected experts, those with little weight do not run; the heaviest always does.

    runs_i  =  w_i >= threshold * R,      or w_i is the largest

    heaviest      R is the largest weight of the token: dynamic skipping (NAEE, arXiv 2402.14800), for any top-k
    selected      R is the sum of all K weights: experts with little gate, whatever the heaviest has

A threshold of 0 skips nothing. Weights are scaled so that they sum to what all K summed to (`renormalise`, as NAEE's code
does), or stay as they are.

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

BESIDE = ("heaviest", "selected")


@policy("skip")
@dataclass(frozen=True)
class Skip(Policy):
    """Experts that weigh less than a share of the token's heaviest one, or of all selected ones, do not run."""

    threshold: float = 0.0
    beside: str = "heaviest"  # one of BESIDE
    renormalise: bool = False  # weights are scaled to the sum of all selected ones
    mean: float = 0.0  # experts that ran for a token of the calibration text; 0: not known

    def check(self, where: str, shape: LayerShape | None) -> None:
        check_number(where, "threshold", self.threshold, 1)
        check_average(where, self.mean, shape)
        if self.beside not in BESIDE:
            raise PlanError(f"{where}: {unknown('weight to compare with', str(self.beside), BESIDE)}")
        if type(self.renormalise) is not bool:
            raise PlanError(f"{where} has renormalise {self.renormalise!r}; it must be true or false")

    def most(self, top_k: int) -> int:
        return top_k

    def average(self, top_k: int) -> float:
        return min(self.mean or top_k, top_k)

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        """Equal weights: both run, or neither, and of several heaviest ones all run."""
        size_TK = size(weight_TK)
        heaviest_T1 = size_TK.amax(dim=1, keepdim=True)
        beside_T1 = heaviest_T1 if self.beside == "heaviest" else size_TK.sum(dim=1, keepdim=True)
        runs_TK = size_TK >= torch.minimum(self.threshold * beside_T1, heaviest_T1)
        return run_only(runs_TK, index_TK, weight_TK, x_TD, self.renormalise)

    def __str__(self) -> str:
        said = f"skips below {self.threshold:.3g} of {self.beside}" + ", weights renormalised" * self.renormalise
        return f"{said}, {self.mean:.2f} on average" if self.mean else said
