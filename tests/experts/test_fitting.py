"""Down weights that are fitted to what several experts give together, against a slow solver."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from locum.experts.fitting import fit_down
from locum.experts.weights import ExpertWeights, mean_expert
from making.handmade import random_weights, toy_shape

TINY = toy_shape(layers=1, experts=4, d=6, f=5)


def swiglu(pre_UG: Tensor) -> Tensor:
    gate, up = pre_UG.chunk(2, dim=-1)
    return silu(gate) * up


def output(expert: ExpertWeights, input_UD: Tensor) -> Tensor:
    """[U, D] token by token."""
    return torch.stack([expert.down_DF @ (silu(expert.gate_FD @ x) * (expert.up_FD @ x)) for x in input_UD])


def test_fitted_down_weights_are_the_least_squares_of_a_slow_solver() -> None:
    members = [random_weights(TINY)(TINY.layers[0].name)(e) for e in range(3)]
    weights, input_UD = (0.5, 0.3, 0.2), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    merged = mean_expert(members, weights)
    fitted = fit_down(merged, members, weights, torch.cat([input_UD, torch.zeros(9, 6)]).double(), swiglu)
    wanted_UD = sum(w * output(member, input_UD) for w, member in zip(weights, members, strict=True))
    hidden_UF = torch.stack([silu(merged.gate_FD @ x) * (merged.up_FD @ x) for x in input_UD])
    slow_DF = torch.linalg.lstsq(hidden_UF.double(), wanted_UD.double()).solution.T
    torch.testing.assert_close(fitted.down_DF.double(), slow_DF, rtol=1e-3, atol=1e-3)
    off, before = ((output(x, input_UD) - wanted_UD).square().sum() for x in (fitted, merged))
    assert off < 0.6 * before
    assert fitted.gate_FD is merged.gate_FD and fitted.up_FD is merged.up_FD


def test_few_inputs_change_little_and_none_change_nothing() -> None:
    members = [random_weights(TINY)(TINY.layers[0].name)(e) for e in range(2)]
    merged = mean_expert(members, (0.5, 0.5))
    assert fit_down(merged, members, (0.5, 0.5), torch.zeros(8, 6).double(), swiglu) is merged
    one = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    change_DF = fit_down(merged, members, (0.5, 0.5), one.double(), swiglu).down_DF - merged.down_DF
    assert torch.linalg.matrix_rank(change_DF, atol=1e-4) == 1
