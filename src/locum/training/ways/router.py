"""Train routers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...data.tokens import Batch
from ...models.next_token_loss import loss_sum
from ...plans.plan import Plan
from ..context import Context, check_layers
from ..routers import train_routers
from . import way


@way("router", source="arXiv 2603.02217 (Router KD), without its teacher", learning_rate=1e-4)
@dataclass(frozen=True)
class Router:
    """Train the routers of all MoE layers; every other weight stays as it is.

    Trained:  the routers.
    Loss:     cross entropy of the next token.
    Edges:    the result is its base with other routers, so `--adapter-only` can write these alone.
    Source:   Router KD, arXiv 2603.02217, trains the same to predict what the original predicts (`router-kd`).
    """

    changes_weights: ClassVar[bool] = False
    across_ranks: ClassVar[bool] = True

    def objection(self, plan: Plan | None) -> str | None:
        return None

    def needs_original(self, plan: Plan | None) -> bool:
        return False

    def check(self, context: Context) -> None:
        check_layers(context)

    def identity(self, context: Context) -> dict[str, str]:
        return {}

    def prepare(self, context: Context, start: int) -> None:
        train_routers(context.model)

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        return {}

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        return loss_sum(context.model, batch, context.device)

    def is_result(self, context: Context, step: int) -> bool:
        return True

    def finish(self, context: Context) -> None:
        pass
