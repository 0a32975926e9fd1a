"""The load-balance loss of routers (Switch Transformer, arXiv 2101.03961, Eq. 4-6, as Mixtral's), read off a live model.

    L = E sum over experts of f_e P_e        per layer; the mean over layers is what training adds

f_e is how often tokens select expert e (it sums to K over the experts, so even use gives L = K), P_e the mean of its
router probability. P is the softmax of the router's logits, or for sigmoid routers their sigmoid divided by its sum
over the experts (DeepSeek-V3, arXiv 2412.19437, Eq. 18). What counts as selected is what the model's own router selects, all K
of them, whether a routing policy lets them run or not. transformers' functions of this name pool the layers before
they multiply f and P, so an expert that one layer neglects and another one overloads looks balanced there; here each
layer is balanced by itself. Padding does not count.

Letters: B blocks, S tokens of a block, T tokens, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import MoeLayer, find_layers
from ..models.routers import router_logits


def load_balance(logits_TE: Tensor, index_TK: Tensor, mask_T: Tensor, sigmoid: bool = False) -> Tensor:
    """The loss of one layer. `mask_T` is 1 for tokens that count and 0 for others."""
    logits_TE, mask_T1 = logits_TE.float(), mask_T.float()[:, None]
    if sigmoid:
        score_TE = logits_TE.sigmoid()
        share_TE = score_TE / score_TE.sum(dim=1, keepdim=True)
    else:
        share_TE = logits_TE.softmax(dim=1)
    tokens = mask_T1.sum().clamp(min=1)
    selected_E = share_TE.new_zeros(logits_TE.shape[1])
    selected_E = selected_E.index_add(0, index_TK.flatten(), mask_T1.expand(index_TK.shape).flatten())
    return logits_TE.shape[1] * ((selected_E / tokens) * ((share_TE * mask_T1).sum(dim=0) / tokens)).sum()


class Balance:
    """Watches routers and experts in a forward pass; `loss` then gives the mean load-balance loss of the layers."""

    def __init__(self, layers: tuple[MoeLayer, ...]) -> None:
        self.layers = layers
        self.logits: dict[str, Tensor] = {}
        self.index: dict[str, Tensor] = {}

    def loss(self, attention_BS: Tensor) -> Tensor:
        """Of the pass that was just made; it starts afresh with the next one."""
        mask_T = attention_BS.reshape(-1)
        losses = []
        for layer in self.layers:
            logits_TE = self.logits[layer.shape.name].reshape(-1, layer.shape.num_experts)
            index_TK = self.index[layer.shape.name]
            losses.append(load_balance(logits_TE, index_TK, mask_T, layer.shape.router_kind == "sigmoid"))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


@contextlib.contextmanager
def balanced(model: nn.Module) -> Iterator[Balance]:
    """Watch all MoE layers of a model while this is entered."""
    balance = Balance(find_layers(model))
    hooks = []
    for layer in balance.layers:

        def see_logits(_module: nn.Module, _given: Any, output: Any, layer: MoeLayer = layer) -> None:
            balance.logits[layer.shape.name] = router_logits(output, layer.family.router)

        def see_index(_module: nn.Module, given: tuple[Any, ...], layer: MoeLayer = layer) -> None:
            balance.index[layer.shape.name] = given[1]

        hooks += [layer.router.register_forward_hook(see_logits), layer.experts.register_forward_pre_hook(see_index)]
    try:
        yield balance
    finally:
        for hook in hooks:
            hook.remove()
