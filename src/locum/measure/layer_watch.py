"""What a layer's block, router and experts get and give while a model runs, and running a block up to its experts.

Letters: T tokens, E experts, K top-k, D model width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import MoeLayer
from ..models.replay import Call
from ..models.routers import router_logits


class LayerWatch:
    """The calls of a layer's block, and what its router and experts get and give, while it is entered."""

    def __init__(self, layer: MoeLayer) -> None:
        self.layer = layer
        self.seen: dict[str, list[Any]] = {name: [] for name in ("calls", "logits_TE", "x_TD", "index_TK", "gate_TK")}

    def __enter__(self) -> LayerWatch:
        layer, seen = self.layer, self.seen

        def block(_block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen["calls"].append(Call(args, kwargs, {}))

        def router(_router: nn.Module, _inputs: Any, output: Any) -> None:
            seen["logits_TE"].append(router_logits(output, layer.family.router).reshape(-1, layer.shape.num_experts))

        def experts(_experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for name, value in zip(("x_TD", "index_TK", "gate_TK"), arguments, strict=True):
                seen[name].append(value)

        self.hooks = [
            layer.block.register_forward_pre_hook(block, with_kwargs=True),
            layer.router.register_forward_hook(router),
            layer.experts.register_forward_pre_hook(experts),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.calls = tuple(self.seen.pop("calls"))
        for name, parts in self.seen.items():
            setattr(self, name, torch.cat(parts) if parts else torch.zeros(0))


class _Reached(BaseException):
    """The experts are called: nothing after that is needed."""


class UpToExperts:
    """While it is entered, a block runs up to its experts and no further."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts

    def __enter__(self) -> UpToExperts:
        self.hook = self.experts.register_forward_pre_hook(self._stop)
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()

    def _stop(self, _experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.routed = arguments[1:]
        raise _Reached

    def run(self, block: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        with contextlib.suppress(_Reached):
            block(*call.args, **call.kwargs)
        return self.routed
