"""Parameters side by side along the first axis: one row for each item of a kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """The tensors of one kind of part."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))

    @classmethod
    def holding(cls, tensors: dict[str, Tensor]) -> Stack:
        """A stack of these very tensors, frozen."""
        stack = cls({}, torch.float32, "cpu")
        for name, tensor in tensors.items():
            stack.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return stack

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._parameters.values())).dtype  # type: ignore[union-attr]
