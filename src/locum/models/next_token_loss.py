"""The loss of predicting the next token, by a live model.

Logits of a large batch are made some rows at a time, and in training again for the gradient of each, so that those of
LOGIT_BYTES are there at once whatever batch and vocabulary.

Letters: B blocks, S tokens of a block, D model width, M tokens that have loss, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import ranks
from ..data.tokens import Batch
from .output_head import run_body, run_head, vocabulary

LOGIT_BYTES = 64 * 2**20  # of float32 logits; a gradient takes up to four times as much beside them

Loss = Callable[
    ..., Tensor
]  # of float32 logits [M, V] of every model, what is given [M, ...], and the tokens [M]: summed


def loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, int]:
    """The summed cross entropy in nats of the tokens that have loss, and their number."""
    return summed([model], batch, device, functools.partial(functional.cross_entropy, reduction="sum"))


def summed(
    models: Sequence[Any], batch: Batch, device: torch.device, loss: Loss, given: Sequence[Tensor] = ()
) -> tuple[Tensor, int]:
    """A loss of the predictions of one model, which learns, and any others, over the tokens that have loss; and their number.
    `given` are tensors [M, ...] with a row for each of these tokens, which the loss gets too."""
    given = [tensor.to(device) for tensor in given]
    rows = LOGIT_BYTES // (4 * vocabulary(models[0]))
    if batch.ids_BS.numel() <= rows or ranks.count() > 1:  # FSDP wants its models called
        return _at_once(models, batch, device, loss, given)
    return _in_pieces(models, batch, device, loss, max(1, rows), given)


def _at_once(
    models: Sequence[Any], batch: Batch, device: torch.device, loss: Loss, given: Sequence[Tensor]
) -> tuple[Tensor, int]:
    ids_BS, attention_BS = batch.ids_BS.to(device), batch.attention_BS.to(device)
    mask_BS, found = batch.loss_mask_BS[:, 1:].to(device), []
    for index, model in enumerate(models):
        with _learning(index):
            logits_BSV = model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False).logits
        found.append(logits_BSV[:, :-1][mask_BS].float())
    labels_M = ids_BS[:, 1:][mask_BS]
    return loss(*found, *given, labels_M), labels_M.numel()


def _in_pieces(
    models: Sequence[Any], batch: Batch, device: torch.device, loss: Loss, rows: int, given: Sequence[Tensor]
) -> tuple[Tensor, int]:
    mask_BS, bodies, hidden = batch.loss_mask_BS[:, 1:].to(device), [], []
    for index, model in enumerate(models):
        with _learning(index):
            bodies.append(run_body(model, batch.ids_BS, batch.attention_BS))
            hidden.append(bodies[-1][1].last_hidden_state[:, :-1][mask_BS].split(rows))
    labels_M = batch.ids_BS.to(device)[:, 1:][mask_BS]

    def piece(labels_M: Tensor, *some: Tensor) -> Tensor:
        found = []
        for index, (body, hidden_MD) in enumerate(zip(bodies, some, strict=False)):  # what is given comes behind
            with _learning(index):
                found.append(run_head(*body, hidden_MD[None], labels_M[None])[0])
        return loss(*found, *some[len(bodies) :], labels_M)

    total, run = torch.zeros((), device=device), piece
    if torch.is_grad_enabled():
        run = functools.partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
    for some in zip(labels_M.split(rows), *hidden, *(tensor.split(rows) for tensor in given), strict=True):
        total = total + run(*some)
    return total, labels_M.numel()


def _learning(index: int) -> torch.set_grad_enabled:
    """Gradients for the first model alone, where there are any."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and index == 0)
