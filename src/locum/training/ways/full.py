"""Train everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...plans.plan import Plan
from ..context import Context
from . import Way, way


@way("full", source="arXiv 2503.00634 (Compressed Experts), section 4", learning_rate=3e-4)
@dataclass(frozen=True)
class Full(Way):
    """Train every parameter of the model; nothing is added.

    Trained:  all parameters, routers, attention and embeddings included.
    Loss:     cross entropy of the next token.
    Cost:     gradients and two moments of AdamW for every parameter: 12 bytes more than the weight itself.
    Source:   Compressed Experts, arXiv 2503.00634, which fine-tunes the whole model.
    """

    across_ranks: ClassVar[bool] = True

    def objection(self, plan: Plan | None) -> str | None:
        if plan is None or not plan.formats:
            return None
        return f"trains every weight, and those in few bits ({', '.join(plan.formats)}) stay as they are"

    def prepare(self, context: Context, start: int) -> None:
        for parameter in context.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
