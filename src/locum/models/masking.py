"""Trying a model without some of its experts, by its own routers: their logits become minus infinity for a while.

That is what removing their rows does (tests compare the two on every family), with two advantages: nothing has to be
put back, and a group-limited router can be asked what one expert is worth, though it could not lose one alone.

Letters: E experts, T tokens, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModel
from .families import MoeLayer


class MaskedRouters(TorchFunctionMode):
    """While it is entered, these layers' routers cannot choose the experts that are removed [E].

    Inside such a router, a product with a matrix of its weights' shape gets minus infinity in the removed columns, which
    is before its own score function, choice and normalisation, whatever they are. Selection biases become minus infinity
    too, for routers that would add them to a score of zero. Afterwards everything is as it was.

    Raises UnsupportedModel for a router that chooses a removed expert all the same.
    """

    def __init__(self, removed: Sequence[tuple[MoeLayer, Tensor]]) -> None:
        super().__init__()
        self.removed = [(layer, removed_E) for layer, removed_E in removed if bool(removed_E.any())]
        self.columns: Tensor | None = None  # removed by the router that is running
        self.shapes: set[torch.Size] = set()  # of its weights
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> MaskedRouters:
        try:
            for layer, removed_E in self.removed:
                before = layer.router.register_forward_pre_hook(self._begin(layer, removed_E))
                after = layer.router.register_forward_hook(self._end, always_call=True)
                check = layer.experts.register_forward_pre_hook(_check(layer, removed_E))
                for hook in (before, after, check):
                    self.stack.callback(hook.remove)
                for part in layer.per_expert:
                    if part.leaf != "bias" and "bias" in part.leaf:  # a linear layer's "bias" is in the product already
                        self.stack.callback(part.tensor.data.copy_, part.tensor.data.clone())
                        columns = removed_E.nonzero().squeeze(1).to(part.tensor.device)
                        part.tensor.data.index_fill_(part.axis, columns, float("-inf"))
            return super().__enter__()
        except BaseException:
            self.stack.close()
            raise

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def _begin(self, layer: MoeLayer, removed_E: Tensor) -> Callable[..., None]:
        def hook(_router: nn.Module, _inputs: Any) -> None:
            self.columns = removed_E.nonzero().squeeze(1)
            self.shapes = {part.tensor.shape for part in layer.per_expert if part.tensor.ndim == 2 and part.axis == 0}

        return hook

    def _end(self, *_: Any) -> None:
        self.columns = None

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        if function is functional.linear and self.columns is not None:
            weight = options["weight"] if "weight" in options else arguments[1]
            if weight.shape in self.shapes:
                return result.index_fill(-1, self.columns.to(result.device), float("-inf"))
        return result


def _check(layer: MoeLayer, removed_E: Tensor) -> Callable[..., None]:
    def hook(_experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        _, index_TK, gate_TK = arguments
        if bool((removed_E.to(index_TK.device)[index_TK] & (gate_TK != 0)).any()):
            raise UnsupportedModel(
                f"router {layer.shape.router} chooses experts whose logits are minus infinity; removals of its experts "
                f"cannot be tried on the live model"
            )

    return hook
