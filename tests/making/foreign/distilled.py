"""A way to recover as another package offers it: one file, its own option, its own loss, the original model as a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from locum.data.tokens import Batch
from locum.errors import OptionError
from locum.files import fingerprint
from locum.options import option
from locum.plans.plan import Plan
from locum.training.context import Context
from locum.training.states import sample
from locum.training.ways import way


@way("distilled", source="arXiv 1503.02531")
@dataclass(frozen=True)
class Distilled:
    """Train every parameter until the model predicts what the original predicts.

    loss = T^2 KL(softmax(z_original / T) || softmax(z / T)),   z the logits of one position, T the temperature
    """

    changes_weights: ClassVar[bool] = True
    temperature: float = option(1.0, "of both distributions", above=0)

    def objection(self, plan: Plan | None) -> str | None:
        return None

    def needs_original(self, plan: Plan | None) -> bool:
        return True

    def check(self, context: Context) -> None:
        if context.original.model is None:
            raise OptionError("distillation needs the whole original model, not its experts alone")

    def identity(self, context: Context) -> dict[str, str]:
        return {"teacher": fingerprint(*map(sample, context.original.model.parameters()))}

    def prepare(self, context: Context, start: int) -> None:
        context.model.requires_grad_(True)

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        return {"temperature": self.temperature}

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        mask = batch.loss_mask_BS[:, 1:]
        with torch.no_grad():
            teacher_MV = self._logits(context.original.model, batch)[mask]
        student_MV = self._logits(context.model, batch)[mask]
        divergence = functional.kl_div(
            student_MV.log_softmax(-1), teacher_MV.log_softmax(-1), reduction="sum", log_target=True
        )
        return self.temperature**2 * divergence, int(mask.sum())

    def is_result(self, context: Context, step: int) -> bool:
        return True

    def finish(self, context: Context) -> None:
        pass

    def _logits(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        logits_BSV = model(input_ids=batch.ids_BS, attention_mask=batch.attention_BS, use_cache=False).logits
        return logits_BSV[:, :-1].float() / self.temperature
