"""Train experts alone, whole ones and stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...models.families import find_layers
from ...plans.plan import Plan
from ..context import Context
from . import Way, way


@way("experts", source="arXiv 2407.01906 (ESFT), all experts", learning_rate=3e-4)
@dataclass(frozen=True)
class Experts(Way):
    """Train every weight of every routed expert; nothing is added.

    Trained:  whole experts and all parts of stand-ins, shared bases and a policy's vectors among them. Routers, shared experts,
              attention and all else are frozen.
    Loss:     cross entropy of the next token.
    Cost:     gradients and two moments of AdamW for every parameter of the experts.
    Source:   ESFT, arXiv 2407.01906, with all experts in place of those that the text uses most (`esft`).
    """

    across_ranks: ClassVar[bool] = True

    def objection(self, plan: Plan | None) -> str | None:
        if plan is None or not plan.formats:
            return None
        return f"trains every weight of experts, and those in few bits ({', '.join(plan.formats)}) stay as they are"

    def prepare(self, context: Context, start: int) -> None:
        context.model.requires_grad_(False)
        for layer in find_layers(context.model):
            for tensor in layer.experts.parameters():
                tensor.requires_grad_(tensor.is_floating_point())
