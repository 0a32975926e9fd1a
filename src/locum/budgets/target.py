"""How much: turning `--remove` or `--fit` into the one plan that meets it, and scores into counts per layer.

Letters: E experts, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..errors import OptionError, PlanError
from ..plans.plan import Plan
from ..shapes import ModelShape

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (i + 1) for unit, base in (("B", 1000), ("IB", 1024)) for i, prefix in enumerate("KMGT")
}


def parse_size(text: str | int) -> int:
    """Bytes from "16GiB", "500 MB" or a plain number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in UNITS:
        raise OptionError(f"cannot read size {text!r}; write for example 16GiB, 900MB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])


def meet_target(
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
