"""Train an adapter on every expert to predict what the original predicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...data.tokens import Batch
from ...plans.plan import Plan
from ...shapes import LayerShape
from ..adapters import (
    check_adapters,
    keep_size_option,
    open_adapters,
    rank_option,
    train_bases_option,
    with_adapters,
)
from ..context import Context, mark_of
from ..distillation import check_distillation, distillation, share_option, temperature_option, top_logits_option
from . import Way, way


@way("kd", source="arXiv 1503.02531 (distillation), on every expert")
@dataclass(frozen=True)
class Distillation(Way):
    """Train as `lora` does, to predict what the original predicts.

        loss = share T^2 KL(softmax(z* / T) || softmax(z / T)) + (1 - share) CE(z, next token)

    z are the logits, z* those of the original, T the temperature.

    Trained:  as by `lora`.
    Loss:     above. Validation is the cross entropy of the next token, as for every way.
    Needs:    the whole original; with `top_logits` K before the training alone, for a forward pass over its text, and then
              8 K + 4 bytes on the disk for every token (training/kept_logits.py).
    Edges:    a model that is the original does not change: its loss and gradients are zero (share 1).
    Raises:   OptionError without the original model, for one of another vocabulary, or a share outside of 0 to 1.
    Cost:     a forward and a backward pass of the compressed model and a forward pass of the original.
    Source:   Hinton et al., arXiv 1503.02531.
    """

    across_ranks: ClassVar[bool] = False  # every rank would hold the whole original
    rank: int = rank_option()
    train_bases: bool = train_bases_option()
    keep_size: bool = keep_size_option()
    share: float = share_option()
    temperature: float = temperature_option()
    top_logits: int = top_logits_option()

    def needs_original(self, plan: Plan | None) -> bool:
        return True

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        return with_adapters(plan, layers, self)

    def check(self, context: Context) -> None:
        check_adapters(context, self)
        check_distillation(context, self.name, self.share, self.temperature)

    def identity(self, context: Context) -> dict[str, str]:
        return {"original": mark_of(context.original)}

    def prepare(self, context: Context, start: int) -> None:
        open_adapters(context, self)

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        return distillation(context, batch, self.share, self.temperature)
