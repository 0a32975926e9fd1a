"""Who gets how much of a budget: experts to prune per layer, and ranks per expert, as in MoE-I2 (arXiv 2411.01016).

Letters: L layers, E experts (of one layer, those that stay), D model width, F expert width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import LayerShape, ModelShape
from .target import spare

COUNTS = ("inverse", "gap", "uniform")


def prune_counts(importance_L: Sequence[float], shape: ModelShape, share: float, policy: str) -> list[int]:
    """Experts to prune from each layer: `share` of all experts together, more of them where the layer matters less.

    The count of layer i is proportional to 1 / I_i ("inverse"), to I_max - I_i ("gap") or to its number of experts
    ("uniform"); rounded by largest remainder, in steps of one expert per group. A layer never gives more than it can
    spare, and none where the family refuses dropping; what that leaves over goes to the others in the same proportions.
    """
    most_L = [0 if layer.refuse_dropping else spare(layer) for layer in shape.layers]
    step_L = [layer.num_groups for layer in shape.layers]
    total = min(round(share * sum(layer.num_experts for layer in shape.layers)), sum(most_L))
    weights_L = {
        "inverse": [1 / (value + 1e-12) for value in importance_L],
        "gap": [max(importance_L) - value + 1e-12 for value in importance_L],
        "uniform": [float(layer.num_experts) for layer in shape.layers],
    }[policy]
    bounds = (torch.zeros(len(most_L), dtype=torch.float64), torch.tensor(most_L, dtype=torch.float64))
    ideal_L = bounded_shares(torch.tensor(weights_L, dtype=torch.float64), float(total), *bounds)
    return rounded(ideal_L, total, step_L, most_L)


def bounded_shares(weight_E: Tensor, total: float, least_E: Tensor, most_E: Tensor) -> Tensor:
    """[E] float64: clip(c * weight, least, most) with the one c that makes them sum to `total` (or as near as bounds let).

    What a bound takes away or adds is thus made up for by the others in proportion to their weights.
    """
    if total <= float(least_E.sum()):
        return least_E.clone()
    if total >= float(most_E.sum()):
        return most_E.clone()
    weight_E = weight_E / weight_E.max()
    bends = torch.cat([least_E / weight_E, most_E / weight_E]).sort().values  # where the sum changes its slope

    def shares(c: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(c * weight_E, least_E), most_E)

    low, high = 0, len(bends) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if float(shares(bends[middle]).sum()) >= total else (middle + 1, high)
    above_E = shares(bends[low])
    below_E = shares(bends[low - 1]) if low else least_E
    rest, gap = total - float(below_E.sum()), float((above_E - below_E).sum())
    return below_E + (above_E - below_E) * (rest / gap if gap > 0 else 0.0)


def rounded(ideal_E: Tensor, total: int, step_E: Sequence[int], most_E: Sequence[int]) -> list[int]:
    """Multiples of the steps near the ideals, of a sum that does not exceed `total` and is as near to it as steps allow.

    Every ideal is rounded down; what is left goes out in steps, to the largest remainder first, to the first of equals.
    """
    steps = [int(value / step + 1e-9) for value, step in zip(ideal_E.tolist(), step_E, strict=True)]
    remainder = [value / step - n for value, step, n in zip(ideal_E.tolist(), step_E, steps, strict=True)]
    result = [n * step for n, step in zip(steps, step_E, strict=True)]
    left = total - sum(result)
    while open_ := [e for e, step in enumerate(step_E) if step <= left and result[e] + step <= most_E[e]]:
        for e in sorted(open_, key=lambda e: -remainder[e]):
            if step_E[e] <= left:
                result[e] += step_E[e]
                left -= step_E[e]
    return result


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
