"""An expert whose last product is fitted to what several experts give together (MergeMoE, arXiv 2510.14436).

Letters: U rows of a sample, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from .weights import ExpertWeights

Activation = Callable[[Tensor], Tensor]  # hidden states [P, F] of first products [P, G], all gate columns first
RIDGE = 1e-6


def fit_down(
    merged: ExpertWeights,
    members: Iterable[ExpertWeights],
    weights: Iterable[float],
    input_UD: Tensor,
    activate: Activation,
) -> ExpertWeights:
    """`merged` with the down weights that give, on these inputs, what is nearest to sum_e w_e f_e(x). One member at a time.

    min over W of ||P W^T - Y||^2 + r ||W - W_down||^2,  P [U, F] the hidden states of `merged`, Y [U, D] what its members give
    together, r a millionth of a hidden unit's squares, summed over the inputs, the mean over units

    Where inputs are few, W stays near the mean of the members' down weights. In float64; biases are those of `merged`.
    """
    input_UD = input_UD[(input_UD != 0).any(dim=1)].to(merged.up_FD.device)
    wanted_UD = torch.zeros(len(input_UD), len(merged.down_DF), dtype=torch.float64, device=input_UD.device)
    for member, weight in zip(members, weights, strict=True):
        wanted_UD += weight * _product(member, hidden_states(member, input_UD, activate))
    hidden_UF = hidden_states(merged, input_UD, activate)
    missing_UD = wanted_UD - _product(merged, hidden_UF)
    square_FF = hidden_UF.T @ hidden_UF
    ridge = RIDGE * float(square_FF.diagonal().mean())
    if not ridge > 0:
        return merged
    square_FF.diagonal().add_(ridge)
    change_DF = torch.linalg.solve(square_FF, hidden_UF.T @ missing_UD).T
    return replace(merged, down_DF=(merged.down_DF.double() + change_DF).to(merged.down_DF.dtype))


def hidden_states(expert: ExpertWeights, input_UD: Tensor, activate: Activation) -> Tensor:
    """[U, F] float64: what an expert's last product multiplies."""
    bias_G = expert.gate_up_bias_G
    pre_UG = linear(input_UD.float(), expert.gate_up_GD.float(), None if bias_G is None else bias_G.float())
    return activate(pre_UG).double()


def _product(expert: ExpertWeights, hidden_UF: Tensor) -> Tensor:
    bias_D = expert.down_bias_D
    return linear(hidden_UF, expert.down_DF.double(), None if bias_D is None else bias_D.double())
