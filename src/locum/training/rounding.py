"""Adapters that a checkpoint has in few bits, in training: numbers, rounded to their format wherever the layer computes.

What is trained are numbers in float32. The layer computes with their nearest levels, and the gradient goes to the numbers as if
nothing had been rounded (straight-through, arXiv 1308.3432). So a model in training is the one that is written, to the bit, and
what is validated too. A matrix that is still nearer to what it came as than to its nearest levels keeps its bytes: a run begins
with the model as it came, whoever chose its levels.

Letters: N stacked items, O outputs (rows) and I inputs (columns) of an item, Y bytes of an item.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ranks
from ..formats.rows import pack_stack, unpack_stack


@dataclass
class Rounding:
    """One tensor of a stack of adapters."""

    came_NY: Tensor
    format: str
    shape: tuple[int, int]
    _known: tuple[int, Tensor] | None = field(default=None, repr=False)  # of which version of the numbers, and rounded

    def numbers(self, bytes_NY: Tensor) -> Tensor:
        return unpack_stack(self.format, bytes_NY, self.shape, torch.float32)

    def bytes(self, trained_NOI: Tensor) -> Tensor:
        """What is written for trained numbers [N, Y]."""
        wide_NOI, came_NY = trained_NOI.detach().float(), self.came_NY.to(trained_NOI.device)
        near_NY = pack_stack(self.format, wide_NOI)
        came_N, near_N = ((self.numbers(x) - wide_NOI).square().flatten(1).sum(1) for x in (came_NY, near_NY))
        return torch.where((came_N <= near_N)[:, None], came_NY, near_NY)

    def __call__(self, trained_NOI: Tensor) -> Tensor:
        """The numbers that the layer computes with [N, O, I]."""
        if self._known is None or self._known[0] != trained_NOI._version or ranks.count() > 1:  # which gather them anew
            self._known = (trained_NOI._version, self.numbers(self.bytes(trained_NOI)))
        rounded_NOI = self._known[1]
        return rounded_NOI + (trained_NOI - trained_NOI.detach()) if torch.is_grad_enabled() else rounded_NOI
