"""The loss of predicting the next token, by a live model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.tokens import Batch


def loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, int]:
    """The summed cross entropy in nats of the tokens that have loss, and their number."""
    logits_MV, labels_M = predictions(model, batch, device)
    return functional.cross_entropy(logits_MV, labels_M, reduction="sum"), labels_M.numel()


def predictions(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Float32 logits [M, V] of the M tokens that have loss, and the tokens [M]."""
    ids_BS = batch.ids_BS.to(device)
    logits_BSV = model(input_ids=ids_BS, attention_mask=batch.attention_BS.to(device), use_cache=False).logits
    mask = batch.loss_mask_BS[:, 1:].to(device)
    return logits_BSV[:, :-1][mask].float(), ids_BS[:, 1:][mask]
