"""The loss of predicting what the original predicts, mixed with that of the next token: what ways that distil share.

    loss = share T^2 KL(softmax(z* / T) || softmax(z / T)) + (1 - share) CE(z, next token)

z are the logits, z* those of the original, T the temperature (Hinton et al., arXiv 1503.02531).

Letters: M positions with loss, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from ..data.tokens import Batch
from ..errors import OptionError
from ..models.next_token_loss import summed
from ..options import option
from .context import Context, check_whole_original


def share_option() -> Any:
    """The field of a way's options that mixes the two losses."""
    return option(1.0, "of the loss that is distillation; the rest is next-token loss")


def temperature_option() -> Any:
    """The field of a way's options by which logits are divided."""
    return option(1.0, "by which both models' logits are divided")


def check_distillation(context: Context, how: str, share: float, temperature: float) -> None:
    """Refuse senseless options, and an original that is not there or has another vocabulary. Raises OptionError."""
    if not 0 <= share <= 1:
        raise OptionError(f"--share is {share}; allowed: 0 to 1")
    if not 0 < temperature < float("inf"):
        raise OptionError(f"--temperature is {temperature}; allowed: numbers above 0")
    original = check_whole_original(context, how)
    sizes = [model.config.get_text_config().vocab_size for model in (context.model, original)]
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the model has a vocabulary of {sizes[0]} and the original one of {sizes[1]}; give the model that this one "
            f"was compressed from with --original"
        )


def distillation(context: Context, batch: Batch, share: float, temperature: float) -> tuple[Tensor, int]:
    """The loss, summed over the positions of a batch that have loss, and their number."""

    def mixed(ours_MV: Tensor, theirs_MV: Tensor, labels_M: Tensor) -> Tensor:
        loss = (1 - share) * functional.cross_entropy(ours_MV, labels_M, reduction="sum")
        logs = ((x / temperature).log_softmax(-1) for x in (ours_MV, theirs_MV))
        return loss + share * temperature**2 * functional.kl_div(*logs, reduction="sum", log_target=True)

    return summed([context.model, context.original.model], batch, context.device, mixed)
