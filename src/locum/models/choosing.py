"""Policies that choose experts in place of a router, from its logits: put behind the routers of a live model.

A router puts out its logits, weights and indices together, so what it puts out is changed, whatever it is of a family.

Letters: T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from ..experts.policies.policy import Policy
from ..plans.plan import Plan
from .families import MoeLayer
from .routers import RouterRule, router_logits


@dataclass(frozen=True)
class Choosing:
    """A forward hook of a router: the policy's choice in place of its own. A class, so that models stay picklable."""

    policy: Policy
    rule: RouterRule

    def __call__(self, _router: nn.Module, _inputs: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        at = next(i for i, part in enumerate(output) if not part.is_floating_point())
        weights = next(i for i, part in enumerate(output) if i != at and part.shape == output[at].shape)
        logits = router_logits(output, self.rule)
        index_TK, weight_TK = (x.reshape(-1, x.shape[-1]) for x in (output[at], output[weights]))
        chosen = self.policy.choose(logits.reshape(-1, logits.shape[-1]), index_TK, weight_TK)
        changed = {i: x.view_as(output[i]) for i, x in zip((at, weights), chosen, strict=True)}
        return tuple(changed.get(i, part) for i, part in enumerate(output))


def choose_by(layer: MoeLayer, policy: Policy | None) -> None:
    """Let a policy choose behind a layer's router, if it chooses. Raises UnsupportedModel where it cannot."""
    if policy is not None and policy.chooses:
        _check(layer)
        layer.router.register_forward_hook(Choosing(policy, layer.family.router))


def check_choosing(layers: Iterable[MoeLayer], plan: Plan) -> None:
    """Refuse, before any work, a plan with a policy that chooses, on a router that goes by more than its logits."""
    policies = {layer.layer: layer.routing for layer in plan.layers}
    for layer in layers:
        policy = policies.get(layer.shape.name)
        if policy is not None and policy.chooses:
            _check(layer)


def _check(layer: MoeLayer) -> None:
    # A linear layer's "bias" is in the logits already.
    for part in layer.per_expert:
        if part.leaf != "bias" and ("bias" in part.leaf or part.tensor.ndim == 1):
            raise UnsupportedModel(
                f"{layer.shape.router} has {part.leaf} for every expert, by which it chooses or weighs experts beside its logits, "
                f"so no policy can choose in its place; use one that acts on what it selected (top-p, skip)"
            )
