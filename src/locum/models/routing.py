"""What routers say in a forward pass of a live model, read off by hooks: of stock layers and of containers alike.

Letters: T tokens, E experts, K top-k, M experts that may run, B blocks, S tokens of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.policies.policy import Policy
from .families import MoeLayer, find_layers
from .routers import router_logits


@dataclass(frozen=True, eq=False)
class Routed:
    """What the router of one layer said in one pass, padding included."""

    logits_TE: Tensor
    index_TK: Tensor  # the experts that the model's own rule selects, whether a policy lets them run or not
    weight_TK: Tensor  # what their outputs are multiplied with
    is_sigmoid: bool
    running_TM: Tensor | None = None  # the experts that run, -1 for one that does not; None: those that were selected
    width_E: tuple[int, ...] | None = None  # hidden units of every expert, where the layer was watched
    policy: Policy | None = None  # the layer's routing policy

    @property
    def runs_TM(self) -> Tensor:
        """The experts that run for every token, -1 for one that does not."""
        return self.index_TK if self.running_TM is None else self.running_TM

    @property
    def share_TE(self) -> Tensor:
        """The router's probabilities: softmax of the logits, or of sigmoid routers their scores divided by the sum over the experts
        (DeepSeek-V3, arXiv 2412.19437, Eq. 18)."""
        logits_TE = self.logits_TE.float()
        if not self.is_sigmoid:
            return logits_TE.softmax(dim=1)
        score_TE = logits_TE.sigmoid()
        return score_TE / score_TE.sum(dim=1, keepdim=True)


class Routing:
    """Watches routers and experts; `of` then says what they did in the pass that was just made."""

    def __init__(self, layers: tuple[MoeLayer, ...]) -> None:
        self.layers = layers
        self.logits: dict[str, Tensor] = {}
        self.selected: dict[str, tuple[Tensor, ...]] = {}

    def of(self, layer: MoeLayer) -> Routed:
        name = layer.shape.name
        logits_TE = self.logits[name].reshape(-1, layer.shape.num_experts)
        inputs, is_sigmoid = self.selected[name], layer.shape.router_kind == "sigmoid"
        layout = getattr(layer.experts, "layout", None)
        if layout is None:
            width_E = (layer.shape.expert_width,) * layer.shape.num_experts
            return Routed(logits_TE, *inputs[1:], is_sigmoid, width_E=width_E)
        with torch.no_grad():
            running_TM = layer.experts.routed(*inputs).index_TM
        return Routed(logits_TE, *inputs[1:], is_sigmoid, running_TM, layout.hidden_units, layout.routing)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Routing]:
    """Watch all MoE layers of a model while this is entered."""
    routing = Routing(find_layers(model))
    hooks = []
    for layer in routing.layers:

        def see_logits(_module: nn.Module, _given: Any, output: Any, layer: MoeLayer = layer) -> None:
            routing.logits[layer.shape.name] = router_logits(output, layer.family.router)

        def see_selected(_module: nn.Module, given: tuple[Any, ...], layer: MoeLayer = layer) -> None:
            routing.selected[layer.shape.name] = given[:3]

        hooks += [layer.router.register_forward_hook(see_logits), layer.experts.register_forward_pre_hook(see_selected)]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()
