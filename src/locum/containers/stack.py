"""Parameters side by side along the first axis: one row for each item of a kind."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """The tensors of one kind of part.

    They are read by calling it: where a layer is offloaded or sharded, hooks on the call bring them in and let them go.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.leaves = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))

    @classmethod
    def holding(cls, tensors: dict[str, Tensor]) -> Stack:
        """A stack of these very tensors, frozen."""
        stack = cls({}, torch.float32, "cpu")
        stack.leaves = tuple(tensors)
        for name, tensor in tensors.items():
            stack.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return stack

    def forward(self) -> SimpleNamespace:
        """The tensors by their names, as they are during this call."""
        return SimpleNamespace(**{leaf: getattr(self, leaf) for leaf in self.leaves})

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self, self.leaves[0]).dtype
