"""What a forward pass must read and compute, whatever computes it: bytes of weights and operations, from the text at hand.

Counted from the plan's layouts and from what really runs: hooks see which experts the drawn tokens reach, and a weight
that several tokens share is read once. Operations are those of products with weights, two for each multiplication.
Left out are activations, the cache of keys and values and the products with it, so what is counted is the least.

Letters: T tokens, K top-k, M main experts, P pairs (token, expert), E experts, N stacked items, V vocabulary, but
in `offsets_NV`, a name in files, what one expert stores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..containers.container import StandInExperts
from ..containers.costs import container_work
from ..models.families import MoeLayer, find_layers


@dataclass
class Call:
    """One forward pass: tokens, bytes of the weights it reads, operations, and how many experts ran in each layer."""

    tokens: int
    bytes: int = 0
    operations: int = 0
    experts: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set, repr=False, compare=False)  # weights that this pass has read already


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[Call]]:
    """The forward passes of a model while the block runs, one `Call` each."""
    calls: list[Call] = []
    layers = find_layers(model)
    inside = {id(m) for layer in layers for m in layer.experts.modules()}

    def begin(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(_first_tensor(args, kwargs).numel()))

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    for module in model.modules():
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(_plain_hook(calls), with_kwargs=True))
    hooks += [layer.experts.register_forward_pre_hook(_experts_hook(calls, layer)) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _plain_hook(calls: list[Call]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, given = calls[-1], _first_tensor(args, kwargs)
        if isinstance(module, nn.Embedding):
            call.bytes += given.numel() * module.weight.shape[1] * module.weight.element_size()
            return
        for parameter in module.parameters(recurse=False):
            if parameter.data_ptr() not in call.seen:
                call.seen.add(parameter.data_ptr())
                call.bytes += parameter.nbytes
            if parameter.ndim > 1:
                call.operations += 2 * parameter.numel() * (given.numel() // given.shape[-1])

    return hook


def _experts_hook(calls: list[Call], layer: MoeLayer) -> Any:
    def hook(experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x_TD, index_TK, weight_TK = arguments
        call = calls[-1]
        itemsize = next((p.element_size() for p in experts.parameters() if p.is_floating_point()), 0)
        if isinstance(experts, StandInExperts):
            read, operations, ran = container_work(experts, x_TD, index_TK, weight_TK, itemsize)
        else:
            ran = len(torch.unique(index_TK))
            read = ran * layer.shape.parameters() * itemsize
            operations = 2 * index_TK.numel() * (layer.shape.parameters() - layer.shape.bias_parameters())
        call.bytes += read
        call.operations += operations
        call.experts.append(ran)

    return hook
