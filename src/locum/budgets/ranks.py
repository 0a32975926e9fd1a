"""Who gets how much of a budget: experts to prune per layer, and ranks per expert, as in MoE-I2 (arXiv 2411.01016).

Letters: L layers, E experts (of one layer, those that stay), D model width, F expert width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import LayerShape
from .counts import bounded_shares, rounded


def rank_shares(importance_E: Tensor, exponent: float = 0.15, eps: float = 1e-6) -> Tensor:
    """[E] each expert's share of a layer's ranks, with sum 1: (I + eps)^exponent over the sum of it (MoE-I2).

    A small exponent flattens the spread; with 0 all shares are equal.
    """
    weight_E = (importance_E.double().clamp(min=0) + eps) ** exponent
    return weight_E / weight_E.sum()


def rank_step(layer: LayerShape, multiple: int) -> int:
    """What ranks are multiples of: `multiple`, halved until four steps fit into the smaller side of the weights."""
    while multiple > 1 and 4 * multiple > min(layer.hidden_size, layer.expert_width):
        multiple //= 2
    return multiple


def break_even(layer: LayerShape) -> int:
    """The lowest rank whose adapter is not smaller than the dense expert; both keep their biases."""
    d, f = layer.hidden_size, layer.expert_width
    return -(-d * f // (d + f))


def rank_bounds(layer: LayerShape, minimum: int, multiple: int) -> tuple[int, int, int]:
    """Smallest rank, the amount that stands for an expert kept dense, and the step; the first two are multiples of it."""
    step = rank_step(layer, multiple)
    dense = -(-break_even(layer) // step) * step
    return min(-(-minimum // step) * step, dense), dense, step


def allocate_ranks(share_E: Tensor, total: int, least: int, dense: int, step: int) -> list[int]:
    """The rank of every expert: its share of `total`, as far as the bounds allow; `dense` for one that is kept whole.

    Ranks are multiples of `step`, at least `least`, below `dense`; an expert whose share reaches `dense` costs as much
    low-rank as whole and stays whole. Their sum, a whole one counted as `dense`, never exceeds `total` and is less than
    a step below it, unless every expert is whole. A total below `least` for each lowers `least`.
    """
    count = len(share_E)
    least = min(least, total // count // step * step)
    ideal_E = bounded_shares(share_E, float(total), *(torch.full_like(share_E, bound) for bound in (least, dense)))
    return rounded(ideal_E, total, [step] * count, [dense] * count)
