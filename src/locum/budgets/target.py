"""How much: turning `--remove` or `--fit` into the one plan that meets it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import OptionError, PlanError
from ..plans.plan import Plan
from ..shapes import ModelShape

Levers = Callable[[], list[str]]  # what may be given, in words; asked for only where it is said
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

    `saved` bytes are gone before any plan: those of weights outside of the experts that are put in few bits. `said` is how messages
    name a size that nobody gave as such. Raises OptionError unless exactly one of the two is given, and for a fraction out of range.
    """

    remove: float | None = None
    fit: int | None = None
    saved: int = 0
    said: str = ""

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

    def check_reached(self, plan: Plan, shape: ModelShape, levers: Levers = list) -> None:
        """Raise PlanError where the most that a method can do, this plan, is too little. `levers` are what lets it do more."""
        removed = plan.removed(shape)
        if self.fit is not None and self.excess(plan, shape) > 0:
            smallest = plan.size(shape).bytes - self.saved
            said = (
                f"{self.said or f'--fit {self.fit:,} bytes'} is out of reach: this method can shrink the checkpoint to {smallest:,} bytes "
                f"({smallest / 2**30:.3f} GiB) at best, from {shape.bytes:,}{_why(plan, shape)}"
            )
        elif self.remove is not None and (removed <= 0 or self.excess(plan, shape) > _least_step(shape)):
            most = f"{removed:.4f}" if removed > 0 else "none"
            said = (
                f"--remove {self.remove:g} is out of reach: this method can remove {most} of the expert parameters at best "
                f"here{_why(plan, shape)}"
            )
        else:
            return
        less = ["allow more"] if self.fit is not None and not self.said else ["ask for less"] * (removed > 0)
        other = "a method that makes experts smaller, such as narrow" if _why(plan, shape) else "another method"
        raise PlanError(f"{said}; {', or '.join([*less, *levers(), f'choose {other}'])}")

    def check_not_passed(self, plan: Plan, shape: ModelShape, levers: Levers = list) -> None:
        """Raise PlanError where the least that a method does, this plan, removes far more than asked. `levers` let it do less."""
        if self.remove is not None and -self.excess(plan, shape) > _half_step(shape):
            advice = ", or ".join(["ask for that or more", *levers()])
            raise PlanError(
                f"--remove {self.remove:g} is too little for this method: the least it removes here is "
                f"{plan.removed(shape):.4f} of the expert parameters, and below that nothing at all; {advice}"
            )


def _why(plan: Plan, shape: ModelShape) -> str:
    """That the routers need the experts that are left, where they do; else nothing."""
    left = {layer.layer: len(layer.survivors) for layer in plan.layers if not layer.dropped}
    if any(left.get(layer.name, layer.num_experts) > layer.top_k for layer in shape.layers):
        return ""
    if any(slot.is_replaced for layer in plan.layers for slot in layer.slots):
        return ""
    counts = dict.fromkeys(str(layer.top_k) for layer in shape.layers)
    return f", as a layer keeps as many experts as its router selects ({', '.join(counts)})"


def check_met(plan: Plan, shape: ModelShape, target: Target, more: Levers = list, less: Levers = list) -> Plan:
    """A plan that was made for a target. Raises PlanError, as `meet_target` does, where it does not meet it."""
    target.check_reached(plan, shape, more)
    target.check_not_passed(plan, shape, less)
    return plan


def meet_target(
    build: Callable[[float], Plan], shape: ModelShape, target: Target, more: Levers = list, less: Levers = list
) -> Plan:
    """The plan that meets a target, by bisection.

    `build(amount)` makes a plan for an amount from 0 to 1, more amount meaning less left. Plans change in steps of
    whole experts: for `remove` the nearest step is taken (as LightMoE, App. D), for `fit` the largest that fits. Where the
    first step removes much at once (the experts that a search dropped), a target far below it is refused.
    Raises PlanError, with the best that can be had, for a target out of reach; `more` and `less` are what a user may give then.
    """

    def excess(plan: Plan) -> float:
        return target.excess(plan, shape)

    low, high = build(0.0), build(1.0)
    if target.fit is not None and excess(low) <= 0:
        return low
    if excess(high) > 0:
        target.check_reached(high, shape, more)
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
        target.check_not_passed(high, shape, less)
    return low if abs(excess(low)) < abs(excess(high)) else high


def _least_step(shape: ModelShape) -> float:
    """Half of what one expert is of the largest layer."""
    return 0.5 / max(layer.num_experts for layer in shape.layers)


def _half_step(shape: ModelShape) -> float:
    """Half of what one expert, or one of every group, is of the smallest layer: as near as whole experts come."""
    return 0.5 * max(layer.num_groups / layer.num_experts for layer in shape.layers)
