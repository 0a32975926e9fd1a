"""Rows of a container's stacks as whole weights again: what conversion and training read.

Letters: D model width, F expert width, R rank.
"""

from __future__ import annotations

from torch import Tensor

from ..experts.weights import ExpertWeights
from .layout import Layout
from .stack import Stack


def adapter_product(stack: Stack, row: int) -> dict[str, Tensor]:
    """B A of one adapter for each projection, in float32, under the names of ExpertWeights."""
    tensors = {name: parameter.detach()[row].float() for name, parameter in stack.named_parameters()}
    rank = tensors["up_B_FR"].shape[1]
    first = tensors["gate_up_A"]
    products = {"up_FD": tensors["up_B_FR"] @ first[-rank:], "down_DF": tensors["down_B_DR"] @ tensors["down_A_RF"]}
    if "gate_B_FR" in tensors:
        products["gate_FD"] = tensors["gate_B_FR"] @ first[:rank]
    return products


def row_weights(dense: dict[str, Tensor], row: int, layout: Layout) -> ExpertWeights:
    """One dense row as an expert."""

    def split(first: Tensor) -> tuple[Tensor | None, Tensor]:
        return (first[: layout.expert_width], first[layout.expert_width :]) if layout.has_gate else (None, first)

    gate_FD, up_FD = split(dense["dense.gate_up_NGD"][row])
    if not layout.has_bias:
        return ExpertWeights(gate_FD, up_FD, dense["dense.down_NDF"][row])
    biases = split(dense["dense.gate_up_bias_NG"][row])
    return ExpertWeights(gate_FD, up_FD, dense["dense.down_NDF"][row], *biases, dense["dense.down_bias_ND"][row])
