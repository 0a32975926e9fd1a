"""A routing policy of another package: experts that weigh little beside the token's heaviest one do not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from locum.errors import PlanError
from locum.experts.policies.policy import Counts, Policy, Routed, policy
from locum.shapes import LayerShape


@policy("skip_light")
@dataclass(frozen=True)
class SkipLight(Policy):
    """An expert runs if its router weight is at least `share` of the greatest one of its token."""

    share: float = 0.5

    def check(self, where: str, shape: LayerShape | None) -> None:
        if not 0 < self.share < 1:
            raise PlanError(f"{where} has share {self.share!r}; allowed: more than 0, less than 1")

    def most(self, top_k: int) -> int:
        return top_k

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        runs_TK = weight_TK >= self.share * weight_TK.amax(dim=1, keepdim=True)
        return Routed(torch.where(runs_TK, index_TK, -1), torch.where(runs_TK, weight_TK, 0), (x_TD,))

    def __str__(self) -> str:
        return f"experts below {self.share:g} of the heaviest are skipped"
