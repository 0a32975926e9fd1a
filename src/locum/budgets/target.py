"""How much: turning `--remove` or `--fit` into the one plan that meets it, and scores into counts per layer.

Letters: E experts, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import OptionError, PlanError
from ..plans.plan import Plan
from ..shapes import LayerShape, ModelShape

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (i + 1) for unit, base in (("B", 1000), ("IB", 1024)) for i, prefix in enumerate("KMGT")
}


def parse_size(text: str | int) -> int:
    """Bytes from "16GiB", "500 MB" or a plain number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in UNITS:
        raise OptionError(f"cannot read size {text!r}; write for example 16GiB, 900MB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])


def search(
    build: Callable[[float], Plan], shape: ModelShape, remove: float | None = None, fit: int | None = None
) -> Plan:
    """The plan that removes the fraction `remove` of the routed experts' parameters, or that fits `fit` bytes.

    `build(amount)` makes a plan for an amount from 0 to 1, more amount meaning less left. Plans change in steps of
    whole experts: for `remove` the nearest step is taken (as LightMoE, App. D), for `fit` the largest that fits. Where the
    first step removes much at once (the experts that a search dropped), a target far below it is refused.
    Raises OptionError for a target out of range and PlanError, with the best that can be had, for one out of reach.
    """
    if (remove is None) == (fit is None):
        raise OptionError("give exactly one of --remove (a fraction, such as 0.5) and --fit (a size, such as 16GiB)")
    if remove is not None and not 0 < remove < 1:
        raise OptionError(
            f"--remove is {remove:g}; it is the fraction of expert parameters to remove: above 0, below 1"
        )

    def excess(plan: Plan) -> float:
        return plan.size(shape).bytes - fit if fit is not None else remove - plan.removed(shape)

    low, high = build(0.0), build(1.0)
    if fit is not None and excess(low) <= 0:
        return low
    if excess(high) > 0:
        if fit is not None:
            smallest = high.size(shape).bytes
            raise PlanError(
                f"--fit {fit:,} bytes is out of reach: this method can shrink the checkpoint to {smallest:,} bytes "
                f"({smallest / 2**30:.3f} GiB) at best, from {shape.bytes:,}; allow more, or choose another method or a lower rank"
            )
        if excess(high) > 0.5 / max(layer.num_experts for layer in shape.layers):
            raise PlanError(
                f"--remove {remove:g} is out of reach: this method can remove {high.removed(shape):.4f} of the expert "
                f"parameters at best here; ask for less, or choose another method, a lower rank or fewer bases"
            )
        return high
    a, b = 0.0, 1.0
    for _ in range(48):
        middle = (a + b) / 2
        plan = build(middle)
        if excess(plan) > 0:
            a, low = middle, plan
        else:
            b, high = middle, plan
    if fit is not None:
        return high
    if a == 0 and min(abs(excess(low)), abs(excess(high))) > _half_step(shape):
        raise PlanError(
            f"--remove {remove:g} is too little for this method: the least it removes here is {high.removed(shape):.4f} of "
            f"the expert parameters, and below that nothing at all; ask for that or more, or search again for fewer experts "
            f"to drop"
        )
    return low if abs(excess(low)) < abs(excess(high)) else high


def _half_step(shape: ModelShape) -> float:
    """Half of what one expert, or one of every group, is of the smallest layer: as near as whole experts come."""
    return 0.5 * max(layer.num_groups / layer.num_experts for layer in shape.layers)


def uniform_counts(shape: ModelShape, amount: float) -> list[int]:
    """Experts to take from each layer, the same share of what each can spare."""
    return [int(amount * spare(layer) + 1e-9) // layer.num_groups * layer.num_groups for layer in shape.layers]


def spare(layer: LayerShape) -> int:
    """Experts a layer can lose: the router still needs top-k of them, and equally many in every group."""
    return layer.num_experts - layer.fewest_experts


def global_counts(scores_LE: Sequence[Tensor], shape: ModelShape, amount: float) -> list[int]:
    """Experts to take from each layer when all layers compete: lowest share of the layer's score first.

    Scores are divided by their layer's sum, so that a layer's experts weigh by their share of it; never more than the
    layer can spare. A group-limited router gives up one expert of every group at a time, at the dearest one's price.
    Ties go to the earlier layer and expert.
    """
    entries = []
    for index, (scores_E, layer) in enumerate(zip(scores_LE, shape.layers, strict=True)):
        share_E = scores_E / scores_E.sum().clamp(min=1e-300)
        rounds = share_E.view(layer.num_groups, -1).sort(dim=1).values.amax(dim=0)[: spare(layer) // layer.num_groups]
        entries += [(cost, index, layer.num_groups) for cost in rounds.tolist()]
    entries.sort()
    counts = [0] * len(shape.layers)
    budget = int(amount * sum(spare(layer) for layer in shape.layers) + 1e-9)
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
