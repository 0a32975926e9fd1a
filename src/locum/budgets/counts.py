"""How many experts each layer gives up, and which have the lowest scores.

Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..shapes import LayerShape, ModelShape


def uniform_counts(shape: ModelShape, amount: float, most_L: Sequence[int] | None = None) -> list[int]:
    """Experts to take from each layer, the same share of what each can spare, or of `most_L`."""
    most_L = [spare(layer) for layer in shape.layers] if most_L is None else most_L
    layers = zip(most_L, shape.layers, strict=True)
    return [int(amount * most + 1e-9) // layer.num_groups * layer.num_groups for most, layer in layers]


def spare(layer: LayerShape) -> int:
    """Experts a layer can lose: the router still needs top-k of them, and equally many in every group."""
    return layer.num_experts - layer.fewest_experts


def most_to_lose(layer: LayerShape, kept: Collection[int] = (), floor: int = 0) -> int:
    """Experts a layer can lose where these are kept, and never fewer than `floor`: equally many of every group."""
    group = layer.num_experts // layer.num_groups
    free = min(sum(e not in kept for e in range(i, i + group)) for i in range(0, layer.num_experts, group))
    most = min(spare(layer), layer.num_groups * free, layer.num_experts - floor)
    return max(0, most) // layer.num_groups * layer.num_groups


def global_counts(
    scores_LE: Sequence[Tensor],
    shape: ModelShape,
    amount: float,
    most_L: Sequence[int] | None = None,
    of_layer: bool = True,
) -> list[int]:
    """Experts to take from each layer when all layers compete: lowest share of the layer's score first.

    Scores are divided by their layer's sum (with `of_layer`), so that a layer's experts weigh by their share of it; never
    more than the layer can spare, or `most_L` says. A group-limited router gives up one expert of every group at a time,
    at the dearest one's price. Infinite scores are no part of the sum. Ties go to the earlier layer and expert.
    """
    most_L = [spare(layer) for layer in shape.layers] if most_L is None else most_L
    entries = []
    for index, (scores_E, layer, most) in enumerate(zip(scores_LE, shape.layers, most_L, strict=True)):
        mass = scores_E[scores_E.isfinite()].sum().clamp(min=1e-300) if of_layer else 1.0
        share_E = scores_E / mass
        rounds = share_E.view(layer.num_groups, -1).sort(dim=1).values.amax(dim=0)[: most // layer.num_groups]
        entries += [(cost, index, layer.num_groups) for cost in rounds.tolist()]
    entries.sort()
    counts = [0] * len(shape.layers)
    budget = int(amount * sum(most_L) + 1e-9)
    for _, index, size in entries:
        if budget < size:
            break
        counts[index] += size
        budget -= size
    return counts


def lowest(scores_E: Tensor, count: int, num_groups: int = 1) -> tuple[int, ...]:
    """The `count` experts with the lowest scores, equally many from each group. Ties go to the lower index."""
    group = scores_E.shape[0] // num_groups
    chosen: list[int] = []
    for start in range(0, scores_E.shape[0], group):
        order = torch.sort(scores_E[start : start + group], stable=True).indices[: count // num_groups]
        chosen += (order + start).tolist()
    return tuple(sorted(chosen))


COUNTS = ("inverse", "gap", "uniform")


def prune_counts(
    importance_L: Sequence[float], shape: ModelShape, share: float, policy: str, most_L: Sequence[int] | None = None
) -> list[int]:
    """Experts to prune from each layer: `share` of all experts together, more of them where the layer matters less.

    The count of layer i is proportional to 1 / I_i ("inverse"), to I_max - I_i ("gap") or to its number of experts
    ("uniform"); rounded by largest remainder, in steps of one expert per group. A layer never gives more than it can
    spare (or `most_L` says), and none where the family refuses dropping; what that leaves over goes to the others in the
    same proportions.
    """
    if most_L is None:
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
