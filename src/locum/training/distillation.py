"""The loss of predicting what the original predicts, mixed with that of the next token: what ways that distil share.

    loss = share T^2 KL(softmax(z* / T) || softmax(z / T)) + (1 - share) CE(z, next token)

z are the logits, z* those of the original, T the temperature (Hinton et al., arXiv 1503.02531). Where only the original's X largest
logits were kept (kept_logits.py), KL is that of X + 1 classes, the last one all other tokens together. With all of them kept it is the
same loss, else one that is lower.

Letters: M positions with loss, X logits kept of each, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.tokens import Batch
from ..errors import OptionError
from ..models.next_token_loss import summed
from ..models.output_head import vocabulary
from ..options import option
from .context import Context, check_whole_original
from .kept_logits import rest_of


def share_option() -> Any:
    """The field of a way's options that mixes the two losses."""
    return option(1.0, "of the loss that is distillation; the rest is next-token loss")


def temperature_option() -> Any:
    """The field of a way's options by which logits are divided."""
    return option(1.0, "by which both models' logits are divided")


def top_logits_option() -> Any:
    """The field of a way's options that says how many of the original's logits are kept on the disk."""
    return option(
        0,
        "of the original's logits of a token that are kept on the disk, so that it is not in memory while training; 0: it is",
        at_least=0,
    )


def check_distillation(context: Context, how: str, share: float, temperature: float) -> None:
    """Refuse senseless options, and an original that is not there or has another vocabulary. Raises OptionError."""
    if not 0 <= share <= 1:
        raise OptionError(f"--share is {share}; allowed: 0 to 1")
    if not 0 < temperature < float("inf"):
        raise OptionError(f"--temperature is {temperature}; allowed: numbers above 0")
    kept = None if context.original is None else context.original.logits
    known = kept.vocabulary if kept else vocabulary(check_whole_original(context, how))
    sizes = [vocabulary(context.model), known]
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the model has a vocabulary of {sizes[0]} and the original one of {sizes[1]}; give the model that this one "
            f"was compressed from with --original"
        )


def distillation(context: Context, batch: Batch, share: float, temperature: float) -> tuple[Tensor, int]:
    """The loss, summed over the positions of a batch that have loss, and their number."""

    if context.original.logits is not None:
        mixed = functools.partial(_of_kept, share=share, temperature=temperature)
        return summed([context.model], batch, context.device, mixed, context.original.logits.of(batch))

    def mixed(ours_MV: Tensor, theirs_MV: Tensor, labels_M: Tensor) -> Tensor:
        loss = (1 - share) * functional.cross_entropy(ours_MV, labels_M, reduction="sum")
        logs = ((x / temperature).log_softmax(-1) for x in (ours_MV, theirs_MV))
        return loss + share * temperature**2 * functional.kl_div(*logs, reduction="sum", log_target=True)

    return summed([context.model, context.original.model], batch, context.device, mixed)


def _of_kept(
    ours_MV: Tensor,
    index_MX: Tensor,
    theirs_MX: Tensor,
    rest_M: Tensor,
    labels_M: Tensor,
    *,
    share: float,
    temperature: float,
) -> Tensor:
    """The same of the logits that were kept of the original, and all others as one class."""
    loss = (1 - share) * functional.cross_entropy(ours_MV, labels_M, reduction="sum")
    ours_MV = (ours_MV / temperature).log_softmax(-1)
    ours_MX = ours_MV.gather(1, index_MX)
    apart = functional.kl_div(ours_MX, theirs_MX, reduction="sum", log_target=True)
    if index_MX.shape[1] < ours_MV.shape[1]:
        there_M = rest_M > -torch.inf  # else nothing is left for others, and they add nothing
        mine_M = rest_of(ours_MV, index_MX)[there_M]
        apart = apart + functional.kl_div(mine_M, rest_M[there_M], reduction="sum", log_target=True)
    return loss + share * temperature**2 * apart
