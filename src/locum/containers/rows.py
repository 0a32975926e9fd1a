"""Rows of a container as whole weights again: what conversion, export and training read.

Letters: D model width, F expert width, N stacked items.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..experts.parts.own_weights import OwnWeights, weights_of
from ..experts.parts.part import Part
from ..experts.weights import ExpertWeights
from .container import StandInExperts
from .layout import Layout
from .stack import as_numbers

NAMES = {
    "gate_up_GD": "gate_up_NGD",
    "down_DF": "down_NDF",
    "gate_up_bias_G": "gate_up_bias_NG",
    "down_bias_D": "down_bias_ND",
}  # of one expert's whole weights, in a stack of them


def tensors_of(container: StandInExperts) -> dict[str, Tensor]:
    """Everything that a container holds, by the names of its layout, without gradients, as it is stored."""
    return {name: container.get_parameter(name).detach() for name in container.layout.tensor_shapes()}


def rows_of_expert(container: StandInExperts, e: int, but: type[Part] | None = None) -> dict[str, dict[str, Tensor]]:
    """The rows that one expert uses, by the prefix of their stack, with what their products read of others; stacks of the kind
    `but` left out. What is in few bits comes as the numbers that it stands for, in float32."""
    found, layout = {}, container.layout
    for prefix, stack in layout.prefixed():
        if stack.rows[e] >= 0 and stack.kind is not but:
            module = container.stack(prefix.removesuffix("."))
            shapes = stack.kind.tensors(stack.variant, layout)
            found[prefix] = {
                leaf: as_numbers(getattr(module, leaf).detach(), stack.format, shape, torch.float32)[stack.rows[e]]
                for leaf, shape in shapes.items()
            }
    prefixes = {stack: prefix for prefix, stack in layout.prefixed()}
    for stack, prefix in prefixes.items():
        if prefix in found and (shared := layout.shared_by(stack)) is not None:
            found[prefix] |= found[prefixes[shared]]
    return found


def whole_weights(container: StandInExperts, e: int) -> dict[str, Tensor]:
    """The weights that one expert computes with, the sum of its parts, in float32, as one dense row.

    Its parts must all be weights: a constant is none (Part.whole).
    """
    layout = container.layout
    kinds = {prefix: stack.kind for prefix, stack in layout.prefixed()}
    device = next(container.parameters(), torch.empty(())).device  # a container of mere nothings has none
    sizes = OwnWeights.tensors((), layout)
    total = {name: torch.zeros(sizes[leaf], device=device) for name, leaf in NAMES.items() if leaf in sizes}
    for prefix, row in rows_of_expert(container, e).items():
        for name, tensor in kinds[prefix].whole(row, layout).items():
            total[name] = total[name] + tensor
    return {NAMES[name]: tensor for name, tensor in total.items()}


def row_weights(dense: Mapping[str, Tensor], row: int, layout: Layout) -> ExpertWeights:
    """One dense row as an expert."""

    leaves = OwnWeights.tensors((), layout)
    return weights_of({leaf: dense[OwnWeights.prefix + leaf][row] for leaf in leaves}, layout.has_gate)
