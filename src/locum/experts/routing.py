"""Which of the selected experts run for a token, and what the others leave behind: one layer's routing policy.

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

Letters: T tokens, K top-k, M main, X auxiliary, E experts, N stacked items, D model width, F expert width, V the width
of what one expert stores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

VECTORS = ("projections", "hidden", "static", "none")


@dataclass(frozen=True)
class Routing:
    """The policy of one layer."""

    main: int  # how many of the selected experts run
    vectors: str = "projections"  # one of VECTORS
    renormalise: bool = False  # main weights are scaled to the sum of all selected ones

    def __str__(self) -> str:
        scaled = ", weights renormalised" if self.renormalise else ""
        return f"{self.main} main, vectors {self.vectors}{scaled}"

    def offsets_shape(self, num_experts: int, hidden_size: int, width: int, has_gate: bool) -> tuple[int, int] | None:
        """N and V of the vectors that a layer stores, or None if it stores none."""
        if self.vectors == "none":
            return None
        first = hidden_size * (2 if has_gate else 1)
        return {
            "projections": (num_experts, first + width),
            "hidden": (num_experts, hidden_size),
            "static": (1, first + width),
        }[self.vectors]

    def vectors_per_token(self, top_k: int) -> int:
        """How many rows of the stored vectors one token uses."""
        return {"none": 0, "static": 1}.get(self.vectors, max(top_k - self.main, 0))


@dataclass(frozen=True)
class Routed:
    """What the experts compute on: `inputs` holds one input for gate and up together, or the gate's and the up's."""

    index_TM: Tensor
    weight_TM: Tensor
    inputs: tuple[Tensor, ...]
    down_TF: Tensor | None = None  # theta_down - 1, for the hidden state in front of the down projection

    def of(self, token_P: Tensor) -> Routed:
        """The same with inputs for every pair in place of every token."""
        down = None if self.down_TF is None else self.down_TF[token_P]
        return replace(self, inputs=tuple(x_TD[token_P] for x_TD in self.inputs), down_TF=down)


def route(
    policy: Routing, offsets_NV: Tensor | None, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, has_gate: bool
) -> Routed:
    """Apply a layer's policy to what its router selected. Equal weights: the earlier of the K goes first."""
    order_TK = torch.sort(weight_TK, dim=1, descending=True, stable=True).indices
    index_TK, weight_TK = index_TK.gather(1, order_TK), weight_TK.gather(1, order_TK)
    index_TM, weight_TM = index_TK[:, : policy.main], weight_TK[:, : policy.main]
    if policy.renormalise:
        weight_TM = weight_TM * _share(weight_TK.sum(1, keepdim=True), weight_TM.sum(1, keepdim=True))
    theta_TV = _modulation(policy, offsets_NV, index_TK[:, policy.main :], weight_TK[:, policy.main :], x_TD)
    if theta_TV is None:
        return Routed(index_TM, weight_TM, (x_TD,))
    d = x_TD.shape[1]
    if policy.vectors == "hidden":
        return Routed(index_TM, weight_TM, (modulate(x_TD, theta_TV),))
    *first, down_TF = theta_TV.split([d, d, theta_TV.shape[1] - 2 * d] if has_gate else [d, theta_TV.shape[1] - d], 1)
    return Routed(index_TM, weight_TM, tuple(modulate(x_TD, part_TD) for part_TD in first), down_TF)


def _modulation(
    policy: Routing, offsets_NV: Tensor | None, index_TX: Tensor, weight_TX: Tensor, x_TD: Tensor
) -> Tensor | None:
    """theta - 1 of every token [T, V], or None where it is nothing."""
    if offsets_NV is None:
        return None
    if policy.vectors == "static":
        return offsets_NV.to(x_TD.dtype).expand(x_TD.shape[0], -1)
    if index_TX.shape[1] == 0:
        return None
    wide_TX = weight_TX.to(torch.promote_types(weight_TX.dtype, torch.float32))
    total_T1 = wide_TX.sum(1, keepdim=True)
    # A token whose auxiliary weights are all zero has no preference among them.
    share_TX = torch.where(total_T1 > 0, _share(wide_TX, total_T1), 1 / index_TX.shape[1])
    share_TE = share_TX.new_zeros(x_TD.shape[0], offsets_NV.shape[0]).scatter_add(1, index_TX, share_TX)
    return (share_TE.to(offsets_NV.dtype) @ offsets_NV).to(x_TD.dtype)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 1 where the whole is zero; never a NaN, in gradients either."""
    zero = whole == 0
    return torch.where(zero, 1.0, part / whole.masked_fill(zero, 1.0))


def modulate(x: Tensor, offset: Tensor) -> Tensor:
    """x (1 + offset), rounded once."""
    return torch.addcmul(x, x, offset)
