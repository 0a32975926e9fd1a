"""Passes of a whole model that begin at a later decoder layer: the layers before it give what they gave before."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .waiting import tensors_in

Result = TypeVar("Result")


class KnownLayers:
    """What the decoder layers of a model give, batch by batch, while nothing is changed.

    A pass that begins at layer n is what the model gives where layers from n on alone are changed, to the bit. Whether it is so is tried
    on the first batch, for every n that is asked for: layers that leave more behind than their output, or that run more than
    once, are run again.

    Memory: the hidden state after every decoder layer, L * tokens * width numbers of the model's dtype.
    """

    def __init__(self, stack: Sequence[nn.Module]) -> None:
        self._stack = list(stack)
        self._given: dict[int, list[Any]] = {}  # outputs of the L layers by batch
        self._begins: dict[int, bool] = {}  # whether a pass can begin at a layer

    def record(self, batch: int, run: Callable[[], Result]) -> Result:
        """What a pass of the unchanged model gives. What its layers give is kept."""
        with self._watched() as given:
            result = run()
        if [index for index, _ in given] == [*range(len(self._stack))]:
            self._given[batch] = [output for _, output in given]
        return result

    def run(self, batch: int, run: Callable[[], Result], first: int) -> Result:
        """What a pass gives that begins at layer `first`; a whole pass where it cannot, as far as was tried (`try_beginning`)."""
        given = self._given.get(batch)
        if given is None or not self._begins.get(first):
            return run()
        with self._giving(given[:first]):
            return run()

    def try_beginning(self, batch: int, run: Callable[[], Any], first: int) -> None:
        """See whether a pass of the unchanged model that begins there gives what the whole one gave."""
        given = self._given.get(batch)
        if not first or given is None or first in self._begins:
            return
        try:
            with self._giving(given[:first]), self._watched() as again:
                run()
        except Exception:  # whatever it is, a whole pass does not raise it: later layers read what the first ones leave
            self._begins[first] = False
            return
        pairs = zip(tensors_in([output for _, output in again]), tensors_in(given), strict=False)
        self._begins[first] = len(again) == len(given) and all(torch.equal(a, b) for a, b in pairs)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[tuple[int, Any]]]:
        given: list[tuple[int, Any]] = []

        def note(index: int, _layer: nn.Module, _inputs: Any, output: Any) -> None:
            given.append((index, output))

        hooks = [layer.register_forward_hook(functools.partial(note, i)) for i, layer in enumerate(self._stack)]
        try:
            yield given
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _giving(self, outputs: Sequence[Any]) -> Iterator[None]:
        """While it is entered, the first layers give these without computing."""
        layers = self._stack[: len(outputs)]
        before = [vars(layer).get("forward") for layer in layers]
        for layer, output in zip(layers, outputs, strict=True):
            layer.forward = functools.partial(_give, output)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def _give(output: Any, *_given: Any, **_named: Any) -> Any:
    return output
