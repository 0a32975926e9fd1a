"""One pass of a model, recorded at its decoder layers, so that single layers and stretches of them can be run again.

Letters: B blocks of text, S tokens of a block, D model width.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.tokens import Batch
from ..errors import UnsupportedModel
from .layer_major import passes
from .waiting import tensors_in


@dataclass
class Call:
    """What a module was called with, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: dict[int, Any]  # copies of what later layers write into, as it was then, by the id of the original
    output: Any = None


class Recording:
    """The calls of every decoder layer of a model, in one pass over some batches.

    Memory: the hidden state before every decoder layer, L * tokens * D numbers of the model's dtype. Layers of a streamed model must
    be brought before they are run again.
    """

    def __init__(self, model: PreTrainedModel, experts: Sequence[str], batches: Sequence[Batch]) -> None:
        self.num_batches = len(batches)
        self.layers: list[nn.Module] = []
        self.position: dict[str, int] = {}  # of the decoder layer that holds these experts
        for name in experts:
            self._find(model, name)
        self.calls: list[list[Call]] = [[] for _ in self.layers]
        hooks = [hook for index, layer in enumerate(self.layers) for hook in self._record(index, layer)]
        try:
            for _ in passes(model, [functools.partial(_run, model, batch) for batch in batches]):
                pass
        finally:
            for hook in hooks:
                hook.remove()

    def _find(self, model: nn.Module, experts: str) -> None:
        parts = experts.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
        prefix = next((p for p in prefixes if isinstance(model.get_submodule(p), nn.ModuleList)), None)
        if prefix is None:
            raise UnsupportedModel(
                f"{experts} is not in a list of decoder layers, so no part of the model can be rerun"
            )
        stack = list(model.get_submodule(prefix))
        if stack[0] not in self.layers:
            self.layers += stack
        self.position[experts] = self.layers.index(stack[int(parts[prefix.count(".") + 1])])

    def _record(self, index: int, layer: nn.Module) -> Iterator[Any]:
        running: dict[int, Call] = {}  # by thread: a streamed model runs all batches at once, each in its own

        def before(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            notes = {id(v): copy.copy(v) for v in (*args, *kwargs.values()) if isinstance(v, (MutableMapping, list))}
            running[threading.get_ident()] = call = Call(args, kwargs, notes)
            self.calls[index].append(call)

        def after(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            running.pop(threading.get_ident()).output = output

        yield layer.register_forward_pre_hook(before, with_kwargs=True)
        yield layer.register_forward_hook(after)

    def stretch(self, experts: Iterable[str]) -> tuple[int, int]:
        """The first and the last decoder layer of those that hold these experts."""
        positions = sorted(self.position[name] for name in experts)
        return positions[0], positions[-1]

    def run(self, first: int, last: int, batch: int) -> Tensor:
        """The hidden state [B, S, ...] after decoder layer `last`, from the recorded input of decoder layer `first`."""
        replaced: dict[int, Any] = {}
        for index in range(first, last + 1):
            if len(self.calls[index]) != self.num_batches:
                raise UnsupportedModel(
                    f"decoder layer {index} runs {len(self.calls[index]) / self.num_batches:g} times in a pass; only models "
                    f"that run each decoder layer once can be rerun in parts"
                )
            call = self.calls[index][batch]
            if index > first and id(self.recorded(index - 1, batch)) not in map(
                id, tensors_in((call.args, call.kwargs))
            ):
                raise UnsupportedModel(
                    f"decoder layer {index} does not take what layer {index - 1} gives: the model changes it in between, so "
                    f"blocks of several layers cannot be rerun"
                )
            for key, copied in call.notes.items():  # copied afresh, once for the whole stretch
                replaced.setdefault(key, copy.copy(copied))
            args = tuple(replaced.get(id(value), value) for value in call.args)
            kwargs = {name: replaced.get(id(value), value) for name, value in call.kwargs.items()}
            output = self.layers[index](*args, **kwargs)
            replaced |= {id(old): new for old, new in zip(tensors_in(call.output), tensors_in(output), strict=True)}
        return next(tensors_in(output))

    def recorded(self, last: int, batch: int) -> Tensor:
        return next(tensors_in(self.calls[last][batch].output))


def _run(model: PreTrainedModel, batch: Batch) -> None:
    mask_BS = None if bool(batch.attention_BS.all()) else batch.attention_BS.to(model.device)
    with torch.no_grad():  # a streamed model runs in threads of its own
        model.base_model(batch.ids_BS.to(model.device), attention_mask=mask_BS, use_cache=False)
