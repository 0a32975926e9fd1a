"""What one layer's container must read and compute for the tokens at hand: numbers and operations.

Letters: T tokens, K top-k, M main experts, P selected (token, expert) pairs, V what an expert's vectors hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..experts.routing import route
from .container import StandInExperts
from .layout import Layout


def container_work(
    container: StandInExperts, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> tuple[int, int, int]:
    """Numbers read, operations, and distinct experts that ran, of a container's layer.

    A token's products with a dense row are made once however many of its experts share the row, except where experts'
    outputs are normed one by one.
    """
    layout = container.layout
    index_TM, (numbers, operations) = index_TK, (0, 0)
    if layout.routing is not None:
        routed = route(layout.routing, container.offsets_NV, x_TD, index_TK, weight_TK, layout.has_gate)
        index_TM, (numbers, operations) = routed.index_TM, _vectors(layout, index_TK, routed.index_TM)
    expert_P = index_TM.flatten().cpu()
    token_P = torch.arange(len(index_TM)).repeat_interleave(index_TM.shape[1])
    sizes = row_sizes(layout)
    rows = {"dense": layout.dense_of, "biases": layout.bias_of, "": layout.constant_of}
    for r in range(len(layout.ranks)):
        pairs = zip(layout.rank_of, layout.adapter_of, strict=True)
        rows[f"adapters.{r}"] = tuple(row if rank == r else -1 for rank, row in pairs)
    for stack, row_of in rows.items():
        row_P = torch.tensor(row_of)[expert_P]
        chosen_P = row_P >= 0
        times = int(chosen_P.sum())
        if stack == "dense" and container.post_expert_norm is None:
            times = len(torch.unique(token_P[chosen_P] * len(row_of) + row_P[chosen_P]))
        stored, multiplied = sizes.get(stack, (0, 0))
        numbers += len(torch.unique(row_P[chosen_P])) * stored
        operations += 2 * times * multiplied
    return numbers, operations, len(torch.unique(expert_P))


def row_sizes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Of one row of each stack of a container: the numbers it stores, and those of them that products are made with."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, shape in layout.tensor_shapes().items():
        stack, _, leaf = name.rpartition(".")
        if leaf != "offsets_NV":
            stored, multiplied = sizes.get(stack, (0, 0))
            count = math.prod(shape[1:])
            added = "bias" in leaf or leaf == "constant_ND"
            sizes[stack] = stored + count, multiplied + (0 if added else count)
    return sizes


def _vectors(layout: Layout, index_TK: Tensor, index_TM: Tensor) -> tuple[int, int]:
    """Numbers read and operations of what the experts that do not run leave behind."""
    shape = layout.tensor_shapes().get("offsets_NV")
    per_token = layout.routing.vectors_per_token(index_TK.shape[1])
    if shape is None or not per_token:
        return 0, 0
    if shape[0] == 1:
        return shape[1], 0
    is_main_TK = (index_TK[:, :, None] == index_TM[:, None, :]).any(dim=2)
    used = len(torch.unique(index_TK[~is_main_TK]))
    return used * shape[1], 2 * len(index_TK) * per_token * shape[1]
