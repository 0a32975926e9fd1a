"""How much: turning `--remove` or `--fit` into the one plan that meets it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Target:
    """How small: the fraction of the routed experts' parameters to remove, or the bytes that the checkpoint has to fit.

    `saved` bytes are gone before any plan: those of weights outside of the experts that are put in few bits. Raises OptionError unless exactly one of the two is given, and for a fraction out of range.
    """

    remove: float | None = None
    fit: int | None = None
    saved: int = 0

    def __post_init__(self) -> None:
        if (self.remove is None) == (self.fit is None):
            raise OptionError(
                "give exactly one of --remove (a fraction, such as 0.5) and --fit (a size, such as 16GiB)"
            )
        if self.remove is not None and not 0 < self.remove < 1:
            raise OptionError(
                f"--remove is {self.remove:g}; it is the fraction of expert parameters to remove: above 0, below 1"
            )

    def saving(self, shape: ModelShape) -> float:
        """Bytes that have to go: of the routed experts for `remove`, of the whole checkpoint for `fit`."""
        if self.fit is None:
            return self.remove * shape.bytes_of_experts
        return max(0, shape.bytes - self.saved - self.fit)

    def in_bytes(self, shape: ModelShape) -> Target:
        """The same as a size of the whole checkpoint: the fraction to remove is then one of the experts' bytes."""
        return self if self.fit is not None else Target(fit=shape.bytes - int(self.saving(shape)))

    def excess(self, plan: Plan, shape: ModelShape) -> float:
        """What a plan leaves too much: bytes for `fit`, a fraction for `remove`. Below 0 where it does more than asked."""
        if self.fit is None:
            return self.remove - plan.removed(shape)
        return plan.size(shape).bytes - self.saved - self.fit

    def check_reached(self, plan: Plan, shape: ModelShape) -> None:
        """Raise PlanError where the most that a method can do, this plan, is too little."""
        if self.fit is not None and self.excess(plan, shape) > 0:
            smallest = plan.size(shape).bytes - self.saved
            raise PlanError(
                f"--fit {self.fit:,} bytes is out of reach: this method can shrink the checkpoint to {smallest:,} bytes "
                f"({smallest / 2**30:.3f} GiB) at best, from {shape.bytes:,}; allow more, or choose another method or a lower rank"
            )
        if self.remove is not None and self.excess(plan, shape) > 0.5 / max(s.num_experts for s in shape.layers):
            raise PlanError(
                f"--remove {self.remove:g} is out of reach: this method can remove {plan.removed(shape):.4f} of the expert "
                f"parameters at best here; ask for less, or choose another method, a lower rank or fewer bases"
            )

    def check_not_passed(self, plan: Plan, shape: ModelShape) -> None:
        """Raise PlanError where the least that a method does, this plan, removes far more than asked."""
        if self.remove is not None and -self.excess(plan, shape) > _half_step(shape):
            raise PlanError(
                f"--remove {self.remove:g} is too little for this method: the least it removes here is "
                f"{plan.removed(shape):.4f} of the expert parameters, and below that nothing at all; ask for that or more, "
                f"or search again for fewer experts to drop"
            )


def check_met(plan: Plan, shape: ModelShape, target: Target) -> Plan:
    """A plan that was made for a target. Raises PlanError, as `meet_target` does, where it does not meet it."""
    target.check_reached(plan, shape)
    target.check_not_passed(plan, shape)
    return plan


def meet_target(build: Callable[[float], Plan], shape: ModelShape, target: Target) -> Plan:
    """The plan that meets a target, by bisection.

    `build(amount)` makes a plan for an amount from 0 to 1, more amount meaning less left. Plans change in steps of
    whole experts: for `remove` the nearest step is taken (as LightMoE, App. D), for `fit` the largest that fits. Where the
    first step removes much at once (the experts that a search dropped), a target far below it is refused.
    Raises PlanError, with the best that can be had, for a target out of reach.
    """

    def excess(plan: Plan) -> float:
        return target.excess(plan, shape)

    low, high = build(0.0), build(1.0)
    if target.fit is not None and excess(low) <= 0:
        return low
    if excess(high) > 0:
        target.check_reached(high, shape)
        return high
    a, b = 0.0, 1.0
    for _ in range(48):
        middle = (a + b) / 2
        plan = build(middle)
        if excess(plan) > 0:
            a, low = middle, plan
        else:
            b, high = middle, plan
    if target.fit is not None:
        return high
    if a == 0 and abs(excess(low)) > _half_step(shape):
        target.check_not_passed(high, shape)
    return low if abs(excess(low)) < abs(excess(high)) else high


def _half_step(shape: ModelShape) -> float:
    """Half of what one expert, or one of every group, is of the smallest layer: as near as whole experts come."""
    return 0.5 * max(layer.num_groups / layer.num_experts for layer in shape.layers)
