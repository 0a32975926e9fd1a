"""One expert's weights in one orientation, and arithmetic on them: means, permutations, alignment.

Letters: D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """One expert in one orientation, whatever the family stores: gate and up are [F, D], down is [D, F]."""

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    def map(self, function: Callable[[str, Tensor], Tensor]) -> ExpertWeights:
        """A copy with `function(name, tensor)` in place of every tensor that is there."""
        return replace(self, **{n: function(n, t) for n, t in vars(self).items() if t is not None})

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Gate (where there is one), up and down."""
        return tuple(m for m in (self.gate_FD, self.up_FD, self.down_DF) if m is not None)

    @property
    def gate_up_GD(self) -> Tensor:
        return self.up_FD if self.gate_FD is None else torch.cat([self.gate_FD, self.up_FD])

    @property
    def gate_up_bias_G(self) -> Tensor | None:
        if self.up_bias_F is None:
            return None
        return self.up_bias_F if self.gate_bias_F is None else torch.cat([self.gate_bias_F, self.up_bias_F])


def mean_expert(experts: Iterable[ExpertWeights], weights: Iterable[float]) -> ExpertWeights:
    """The weighted mean of experts, tensor by tensor, summed in float32 (LightMoE Eq. 4). One of them at a time."""
    first: ExpertWeights | None = None
    totals: dict[str, Tensor] = {}
    for expert, weight in zip(experts, weights, strict=True):
        first = first or expert
        for name, tensor in vars(expert).items():
            if tensor is not None:
                total = totals.setdefault(name, torch.zeros_like(tensor, dtype=torch.float32))
                total += weight * tensor.float()
    if first is None:
        raise ValueError("the mean of no expert")
    return first.map(lambda name, tensor: totals[name].to(tensor.dtype))


def permute_hidden(expert: ExpertWeights, order_F: Tensor) -> ExpertWeights:
    """Reorder an expert's hidden units, or take some of them. Reordered, the function it computes stays the same."""
    return expert.map(
        lambda name, t: t if name == "down_bias_D" else t[:, order_F] if name == "down_DF" else t[order_F]
    )


def alignment(expert: ExpertWeights, reference: ExpertWeights) -> Tensor:
    """[F] the order of an expert's hidden units in which they most resemble those of `reference`.

    Units are matched by the inner product of their gate, up and down weights together, each matrix scaled to unit
    norm, with the Hungarian algorithm (as MC-SMoE, arXiv 2310.01334). Cost: F x F x 3D products and O(F^3) matching.
    """

    def units(e: ExpertWeights) -> Tensor:
        parts = [e.up_FD, e.down_DF.T] + ([] if e.gate_FD is None else [e.gate_FD])
        return torch.cat([part.float() / part.float().norm().clamp(min=1e-30) for part in parts], dim=1)

    similarity_FF = units(reference) @ units(expert).T
    _, order = linear_sum_assignment(similarity_FF.numpy(force=True), maximize=True)
    return torch.as_tensor(order, device=expert.up_FD.device)


def align(expert: ExpertWeights, reference: ExpertWeights) -> ExpertWeights:
    """An expert with its hidden units permuted to those of `reference` that they resemble most."""
    return permute_hidden(expert, alignment(expert, reference))
