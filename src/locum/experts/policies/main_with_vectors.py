"""Main experts with vectors: fewer of the selected experts run, and the others leave vectors behind.

The router still selects K experts for every token. The `main` ones, with the largest weights, run; each of the others,
the auxiliary ones X, contributes a vector for the inputs of the projections instead (Compressed Experts,
arXiv 2503.00634):

    theta = sum over i in X of alpha'_i theta_i,      alpha'_i = alpha_i / sum over j in X of alpha_j
    y     = sum over m in main of alpha_m W_down [(act(W_gate (h * theta_gate)) * (W_up (h * theta_up))) * theta_down]

A token has one theta, which all its main experts share: per layer that is one product of a [T, E] matrix with the
experts' vectors, and nothing of size T x K x D. What is stored is theta_i - 1: an expert that has learnt nothing then
adds exactly nothing in any number format, whereas bfloat16 near one could not hold a step smaller than 0.4 %.

    vectors       what an auxiliary expert leaves behind                                          one expert, or layer
    projections   three vectors: inputs of gate, up and down (the paper's code and its counts)    2D + F
    hidden        one vector, on the hidden state that gate and up read (the paper's text)        D
    static        control: three vectors that a layer has for every token alike (IA3, 2205.05638) 2D + F
    none          control: nothing; the main experts run alone                                    0

Without a gate it is D + F. The main experts' weights stay as the model makes them (the paper), or are scaled by one
number per token so that they sum to what all K summed to (`renormalise`).

Letters: T tokens, K top-k, M main, X auxiliary, E experts, N stacked items, D model width, F expert width, V vocabulary, but
in `offsets_NV`, a name in files, what one expert stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import PlanError, unknown
from ...shapes import LayerShape
from .policy import Counts, Policy, Routed, fraction, modulate, policy, wide

VECTORS_NAME = "offsets_NV"  # their name in a container
VECTORS = ("projections", "hidden", "static", "none")


@policy("main_with_vectors")
@dataclass(frozen=True)
class MainWithVectors(Policy):
    """The main experts of a token run; vectors stand for the others."""

    reads_all: ClassVar[bool] = True

    main: int  # how many of the selected experts run
    vectors: str = "projections"  # one of VECTORS
    renormalise: bool = False  # main weights are scaled to the sum of all selected ones

    def check(self, where: str, shape: LayerShape | None) -> None:
        most = math.inf if shape is None else shape.top_k
        if type(self.main) is not int or not 1 <= self.main <= most:
            raise PlanError(
                f"{where} has main {self.main!r}; allowed: 1 to {most}, the experts that the router selects (top_k)"
            )
        if self.vectors not in VECTORS:
            raise PlanError(f"{where}: {unknown('kind of vectors', str(self.vectors), VECTORS)}")
        if type(self.renormalise) is not bool:
            raise PlanError(f"{where} has renormalise {self.renormalise!r}; it must be true or false")

    def most(self, top_k: int) -> int:
        return min(self.main, top_k)

    def tensors(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        if self.vectors == "none":
            return {}
        first = counts.hidden_size * (2 if counts.has_gate else 1)
        width = counts.hidden_size if self.vectors == "hidden" else first + counts.expert_width
        return {VECTORS_NAME: (1 if self.vectors == "static" else counts.num_experts, width)}

    def per_token(self, top_k: int) -> int:
        return {"none": 0, "static": 1}.get(self.vectors, max(top_k - self.main, 0))

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        """Equal weights: the earlier of the K goes first."""
        offsets_NV = tensors.get(VECTORS_NAME)
        order_TK = torch.sort(weight_TK, dim=1, descending=True, stable=True).indices
        index_TK, weight_TK = index_TK.gather(1, order_TK), weight_TK.gather(1, order_TK)
        index_TM, weight_TM = index_TK[:, : self.main], weight_TK[:, : self.main]
        if self.renormalise:
            weight_TM = weight_TM * fraction(weight_TK.sum(1, keepdim=True), weight_TM.sum(1, keepdim=True))
        theta_TV = _modulation(self, offsets_NV, index_TK[:, self.main :], weight_TK[:, self.main :], x_TD)
        if theta_TV is None:
            return Routed(index_TM, weight_TM, (x_TD,))
        if self.vectors == "hidden":
            return Routed(index_TM, weight_TM, (modulate(x_TD, theta_TV),))
        d = counts.hidden_size
        widths = [d, d, counts.expert_width] if counts.has_gate else [d, counts.expert_width]
        *first, down_TF = theta_TV.split(widths, 1)
        return Routed(index_TM, weight_TM, tuple(modulate(x_TD, part_TD) for part_TD in first), down_TF)

    def work(self, counts: Counts, index_TK: Tensor, routed: Routed) -> tuple[int, int]:
        stored, per_token = self.tensors(counts), self.per_token(index_TK.shape[1])
        if not stored or not per_token:
            return 0, 0
        rows, width = stored[VECTORS_NAME]
        if rows == 1:
            return width, 0
        is_main_TK = (index_TK[:, :, None] == routed.index_TM[:, None, :]).any(dim=2)
        used = len(torch.unique(index_TK[~is_main_TK]))
        return used * width, 2 * len(index_TK) * per_token * width

    def __str__(self) -> str:
        scaled = ", weights renormalised" if self.renormalise else ""
        return f"{self.main} main, vectors {self.vectors}{scaled}"


def _modulation(
    policy: MainWithVectors, offsets_NV: Tensor | None, index_TX: Tensor, weight_TX: Tensor, x_TD: Tensor
) -> Tensor | None:
    """theta - 1 of every token [T, V], or None where it is nothing."""
    if offsets_NV is None:
        return None
    if policy.vectors == "static":
        return offsets_NV.to(x_TD.dtype).expand(x_TD.shape[0], -1)
    if index_TX.shape[1] == 0:
        return None
    wide_TX = wide(weight_TX)
    total_T1 = wide_TX.sum(1, keepdim=True)
    # A token whose auxiliary weights are all zero has no preference among them.
    share_TX = torch.where(total_T1 > 0, fraction(wide_TX, total_T1), 1 / index_TX.shape[1])
    share_TE = share_TX.new_zeros(x_TD.shape[0], offsets_NV.shape[0]).scatter_add(1, index_TX, share_TX)
    return (share_TE.to(offsets_NV.dtype) @ offsets_NV).to(x_TD.dtype)
