"""What routers say in a forward pass of a live model, read off by hooks: of stock layers and of containers alike.

Letters: T tokens, E experts, K top-k, B blocks, S tokens of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .families import MoeLayer, find_layers
from .routers import router_logits


@dataclass(frozen=True, eq=False)
class Routed:
    """What the router of one layer said in one pass, padding included."""

    logits_TE: Tensor
    index_TK: Tensor  # the experts that the model's own rule selects, whether a policy lets them run or not
    weight_TK: Tensor  # what their outputs are multiplied with
    is_sigmoid: bool

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
        self.selected: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, layer: MoeLayer) -> Routed:
        name = layer.shape.name
        logits_TE = self.logits[name].reshape(-1, layer.shape.num_experts)
        return Routed(logits_TE, *self.selected[name], layer.shape.router_kind == "sigmoid")


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Routing]:
    """Watch all MoE layers of a model while this is entered."""
    routing = Routing(find_layers(model))
    hooks = []
    for layer in routing.layers:

        def see_logits(_module: nn.Module, _given: Any, output: Any, layer: MoeLayer = layer) -> None:
            routing.logits[layer.shape.name] = router_logits(output, layer.family.router)

        def see_selected(_module: nn.Module, given: tuple[Any, ...], layer: MoeLayer = layer) -> None:
            routing.selected[layer.shape.name] = given[1], given[2]

        hooks += [layer.router.register_forward_hook(see_logits), layer.experts.register_forward_pre_hook(see_selected)]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()
