"""What the residual stream of a live model holds in front of each MoE layer: what the norm before the experts' block was given.

Which module that norm is, no family says: it is the one whose output the block is called with.

Letters: T tokens, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..models.families import MoeLayer


class Residuals:
    """While they are watched, the hidden state before the norm of the layer that ran last, by the layer's name."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]) -> None:
        self.model, self.layers = model, layers
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of what a module gave: that, and what it got
        self._before: dict[str, Tensor] = {}

    def of(self, name: str, like_TD: Tensor) -> Tensor:
        """[T, D] of the layer that runs now. Raises UnsupportedModel where there is none of the experts' width."""
        before = self._before.pop(name, None)
        before_TD = None if before is None else before.reshape(-1, before.shape[-1])
        if before_TD is None or before_TD.shape != like_TD.shape:
            raise UnsupportedModel(
                f"{name}: no norm in front of its block gives what the block gets, so how far the layer turns a token is not "
                f"known; leave out what asks for it: criterion easy_ep (weighted_ean is the same without it) and method layer-drop"
            )
        return before_TD

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        hooks = []
        try:
            for layer in self.layers:
                for module in _norms(self.model, layer):
                    hooks.append(module.register_forward_hook(self._note))
                hooks.append(layer.block.register_forward_pre_hook(self._find(layer.shape.name), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._made.clear()
            self._before.clear()

    def _note(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and getattr(inputs[0], "shape", None) == output.shape:
            self._made[id(output)] = output, inputs[0]

    def _find(self, name: str) -> Callable[..., None]:
        def hook(_block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else next(iter(named.values()), None)
            output, before = self._made.get(id(given), (None, None))
            if output is given and before is not None:
                self._before[name] = before
            self._made.clear()

        return hook


def _norms(model: nn.Module, layer: MoeLayer) -> list[nn.Module]:
    """Modules of the decoder layer, outside of the block, that could be the norm in front of it: those without parts."""
    parts = layer.shape.name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    stack = next((p for p in prefixes if isinstance(model.get_submodule(p), nn.ModuleList)), None)
    if stack is None:
        return []
    decoder = model.get_submodule(".".join(parts[: stack.count(".") + 2]))
    inside = {id(module) for module in layer.block.modules()}
    return [module for module in decoder.modules() if id(module) not in inside and not any(module.children())]
