"""Train an adapter on every expert to predict what the original predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ...data.tokens import Batch
from ...errors import OptionError
from ...models.next_token_loss import summed
from ...options import option
from ...plans.plan import Plan
from ..adapters import check_adapters, close_adapters, open_adapters, rank_option, train_bases_option
from ..context import Context, check_whole_original, mark_of
from . import way


@way("kd", source="arXiv 1503.02531 (distillation), on every expert")
@dataclass(frozen=True)
class Distillation:
    """Train as `lora` does, to predict what the original predicts.

        loss = share T^2 KL(softmax(z* / T) || softmax(z / T)) + (1 - share) CE(z, next token)

    z are the logits, z* those of the original, T the temperature.

    Trained:  as by `lora`.
    Loss:     above. Validation is the cross entropy of the next token, as for every way.
    Needs:    the whole original.
    Edges:    a model that is the original does not change: its loss and gradients are zero (share 1).
    Raises:   OptionError without the original model, for one of another vocabulary, or a share outside of 0 to 1.
    Cost:     a forward and a backward pass of the compressed model and a forward pass of the original.
    Source:   Hinton et al., arXiv 1503.02531.
    """

    changes_weights: ClassVar[bool] = True
    across_ranks: ClassVar[bool] = False  # every rank would hold the whole original
    rank: int = rank_option()
    train_bases: bool = train_bases_option()
    share: float = option(1.0, "of the loss that is distillation; the rest is next-token loss")
    temperature: float = option(1.0, "by which both models' logits are divided")

    def objection(self, plan: Plan | None) -> str | None:
        return None

    def needs_original(self, plan: Plan | None) -> bool:
        return True

    def check(self, context: Context) -> None:
        check_adapters(context, self.rank)
        if not 0 <= self.share <= 1:
            raise OptionError(f"--share is {self.share}; allowed: 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise OptionError(f"--temperature is {self.temperature}; allowed: numbers above 0")
        original = check_whole_original(context, self.name)
        sizes = [model.config.get_text_config().vocab_size for model in (context.model, original)]
        if sizes[0] != sizes[1]:
            raise OptionError(
                f"the model has a vocabulary of {sizes[0]} and the original one of {sizes[1]}; give the model that this one "
                f"was compressed from with --original"
            )

    def identity(self, context: Context) -> dict[str, str]:
        return {"original": mark_of(context.original)}

    def prepare(self, context: Context, start: int) -> None:
        open_adapters(context, self.rank, self.train_bases)

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        return {}

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        return summed([context.model, context.original.model], batch, context.device, self._mixed)

    def _mixed(self, ours_MV: Tensor, theirs_MV: Tensor, labels_M: Tensor) -> Tensor:
        loss = (1 - self.share) * functional.cross_entropy(ours_MV, labels_M, reduction="sum")
        logs = ((x / self.temperature).log_softmax(-1) for x in (ours_MV, theirs_MV))
        divergence = functional.kl_div(*logs, reduction="sum", log_target=True)
        return loss + self.share * self.temperature**2 * divergence

    def is_result(self, context: Context, step: int) -> bool:
        return True

    def finish(self, context: Context) -> None:
        close_adapters(context)
