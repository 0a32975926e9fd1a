"""Train routers alone to predict what the original predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...data.tokens import Batch
from ...plans.plan import Plan
from ..context import Context, check_layers, mark_of
from ..distillation import check_distillation, distillation, share_option, temperature_option, top_logits_option
from ..routers import train_routers
from . import Way, way


@way("router-kd", source="arXiv 2603.02217 (Router KD)", learning_rate=5e-5)
@dataclass(frozen=True)
class RouterDistillation(Way):
    """Train the routers of all MoE layers to predict what the original predicts; every other weight stays as it is.

        loss = share T^2 KL(softmax(z* / T) || softmax(z / T)) + (1 - share) CE(z, next token)

    z are the logits, z* those of the original, T the temperature.

    Trained:  the routers.
    Loss:     above. Validation is the cross entropy of the next token, as for every way.
    Needs:    the whole original; with `top_logits` K before the training alone, for a forward pass over its text, and then
              8 K + 4 bytes on the disk for every token (training/kept_logits.py).
    Edges:    the result is its base with other routers, so `--adapter-only` can write these alone.
    Raises:   OptionError without the original model, for one of another vocabulary, or a share outside of 0 to 1.
    Cost:     a forward and a backward pass of the compressed model and a forward pass of the original.
    Source:   Router KD, arXiv 2603.02217: share 1, T 1, rate 5e-5. Differs: positions count by the loss mask of the data.
    """

    changes_weights: ClassVar[bool] = False
    across_ranks: ClassVar[bool] = False  # every rank would hold the whole original
    share: float = share_option()
    temperature: float = temperature_option()
    top_logits: int = top_logits_option()

    def needs_original(self, plan: Plan | None) -> bool:
        return True

    def check(self, context: Context) -> None:
        check_layers(context)
        check_distillation(context, self.name, self.share, self.temperature)

    def identity(self, context: Context) -> dict[str, str]:
        return {"original": mark_of(context.original)}

    def prepare(self, context: Context, start: int) -> None:
        train_routers(context.model)

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        return distillation(context, batch, self.share, self.temperature)
