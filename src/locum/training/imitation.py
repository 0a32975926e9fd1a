"""MoE blocks of a compressed model beside those of the original, on the same inputs.

Letters: B blocks, S tokens of a block, M tokens that have loss, D model width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def learning(pairs: Sequence[tuple[nn.Module, nn.Module]], mask_BS: Tensor, losses: list[Tensor]) -> Iterator[None]:
    """Let every block, given with that of the original, add its loss to a list as it runs."""
    try:
        for block, teacher in pairs:
            block.forward = functools.partial(_learn, block.forward, teacher, mask_BS, losses)
        yield
    finally:
        for block, _ in pairs:
            block.__dict__.pop("forward", None)


def _learn(forward: Any, teacher: nn.Module, mask_BS: Tensor, losses: list[Tensor], *given: Any, **named: Any) -> Any:
    """A block's output, without a gradient, after its loss was taken. What comes in has no gradient either."""
    with torch.enable_grad():
        output = forward(*given, **named)
        ours_MD = first(output)[mask_BS].float()
    dtype = next(teacher.parameters()).dtype
    theirs = teacher(*in_dtype(given, dtype), **in_dtype(named, dtype))
    theirs_MD = first(theirs)[mask_BS].float()
    with torch.enable_grad():
        scale = theirs_MD.square().sum(dim=-1).mean().clamp(min=torch.finfo(torch.float32).tiny)
        losses.append((ours_MD - theirs_MD).square().sum() / scale)
    return _map(output, Tensor.detach)


def first(output: Any) -> Tensor:
    """The hidden states among what a block gives."""
    return output if isinstance(output, Tensor) else output[0]


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    """What a block is called with, its numbers in another dtype."""
    return _map(given, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _map(value: Any, change: Any) -> Any:
    """A nest of tuples, lists and dictionaries with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return type(value)(_map(item, change) for item in value) if isinstance(value, (tuple, list)) else value
