"""How long a model's forward passes take, and its decoder layers in them: what a model with more layers would take follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class ForwardTimes:
    """While it is entered, seconds of every forward pass of a model, and of the last of some layers in it, are added up.

    A pass is a call of the model, or calls of its body and then of the model for stretches of logits.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._watched = {"whole": {model, getattr(model, "base_model", model)}, "layer": {layers[-1]}}
        self._open = dict.fromkeys(self._watched, 0)  # calls that have begun, one in the other
        self._begun = dict.fromkeys(self._watched, 0.0)
        self._seconds = dict.fromkeys(self._watched, 0.0)
        self._count, self._device = len(layers), next(model.parameters()).device

    def __enter__(self) -> ForwardTimes:
        self._hooks = []
        for name, modules in self._watched.items():
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(self._begin(name)))
                self._hooks.append(module.register_forward_hook(self._end(name), always_call=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def of_all(self, seconds: float, layers: int) -> float:
        """What took so many seconds, by this model, would take with so many layers, the others like the last one."""
        if not (whole := self._seconds["whole"]):
            return seconds * layers / self._count
        return seconds * (whole + (layers - self._count) * self._seconds["layer"]) / whole

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._open[name]:
                self._begun[name] = self._now()
            self._open[name] += 1

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._open[name] -= 1
            if not self._open[name]:
                self._seconds[name] += self._now() - self._begun[name]

        return hook

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
