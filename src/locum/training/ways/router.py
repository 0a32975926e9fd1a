"""Train routers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..context import Context
from ..routers import train_routers
from . import Way, way


@way("router", source="arXiv 2603.02217 (Router KD), without its teacher", learning_rate=1e-4)
@dataclass(frozen=True)
class Router(Way):
    """Train the routers of all MoE layers; every other weight stays as it is.

    Trained:  the routers.
    Loss:     cross entropy of the next token.
    Edges:    the result is its base with other routers, so `--adapter-only` can write these alone.
    Source:   Router KD, arXiv 2603.02217, trains the same to predict what the original predicts (`router-kd`).
    """

    changes_weights: ClassVar[bool] = False
    across_ranks: ClassVar[bool] = True

    def prepare(self, context: Context, start: int) -> None:
        train_routers(context.model)
