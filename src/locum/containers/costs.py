"""What one layer's container must read and compute for the tokens at hand: bytes and operations.

Letters: T tokens, K top-k, M experts that may run, P pairs (token, expert).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .container import StandInExperts
from .layout import Layout


def container_work(
    container: StandInExperts, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, itemsize: int = 1
) -> tuple[int, int, int]:
    """Bytes read, where a number that is in no format has `itemsize` of them, operations, and distinct experts that ran, of a
    container's layer.

    A token's products with a dense row are made once however many of its experts share the row, except where experts'
    outputs are normed one by one.
    """
    layout, policy = container.layout, container.layout.routing
    routed = container.routed(x_TD, index_TK, weight_TK)
    numbers, operations = (0, 0) if policy is None else policy.work(layout, index_TK, routed)
    read = numbers * itemsize
    runs_P = (routed.index_TM >= 0).flatten().cpu()
    expert_P = routed.index_TM.flatten().cpu()[runs_P]
    token_P = torch.arange(len(routed.index_TM)).repeat_interleave(routed.index_TM.shape[1])[runs_P]
    for stack, (_, multiplied) in zip(layout.stacks, row_sizes(layout).values(), strict=True):
        row_P = torch.tensor(stack.rows)[expert_P]
        chosen_P = row_P >= 0
        times = int(chosen_P.sum())
        if stack.kind.is_whole and container.post_expert_norm is None:
            times = len(torch.unique(token_P[chosen_P] * layout.num_experts + row_P[chosen_P]))
        packed = stack.packed(layout)
        each = (math.prod(row) * (1 if leaf in packed else itemsize) for leaf, row in stack.stored(layout).items())
        read += len(torch.unique(row_P[chosen_P])) * sum(each)
        operations += 2 * times * multiplied
    return read, operations, len(torch.unique(expert_P))


def row_sizes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Of one row of each stack, by prefix: the numbers it stands for, and those of them that products are made with."""
    sizes = {}
    for prefix, stack in layout.prefixed():
        counts = {leaf: math.prod(row) for leaf, row in stack.kind.tensors(stack.variant, layout).items()}
        multiplied = sum(count for leaf, count in counts.items() if stack.kind.multiplied(leaf))
        sizes[prefix] = sum(counts.values()), multiplied
    return sizes
