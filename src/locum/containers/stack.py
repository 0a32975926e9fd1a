"""Parameters side by side along the first axis: one row for each item of a kind. Matrices in few bits are rows of bytes.

Letters: N stacked items.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..formats.rows import is_packed, unpack


class Stack(nn.Module):
    """The tensors of one kind of part. Those that are `packed` are bytes, which nothing casts and nothing trains.

    They are read by calling it: where a layer is offloaded or sharded, hooks on the call bring them in and let them go.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
        packed: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.leaves = tuple(shapes)
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=torch.uint8 if name in packed else dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=name not in packed))

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
        """Of its numbers; of bytes, where it has nothing else."""
        dtypes = [getattr(self, leaf).dtype for leaf in self.leaves]
        return next((dtype for dtype in dtypes if dtype != torch.uint8), torch.uint8)


@dataclass(frozen=True)
class Matrices:
    """Matrices in few bits: each is numbers when it is asked for by its row, and not kept."""

    packed: Tensor  # [N, bytes]
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, row: int) -> Tensor:
        return unpack(self.format, self.packed[row], self.shape, self.dtype)


def as_numbers(stacked: Tensor, format: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | Matrices:
    """A tensor of a stack by its rows, as numbers of this shape."""
    return Matrices(stacked, format, shape, dtype) if is_packed(format, shape) else stacked


class Row(Mapping[str, Tensor]):
    """One row of every tensor of a stack; what is in few bits is read once, when it is asked for."""

    def __init__(self, rows: Mapping[str, Matrices | tuple[Tensor, ...]], row: int) -> None:
        self._rows, self._row = rows, row
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, leaf: str) -> Tensor:
        if leaf not in self._read:
            self._read[leaf] = self._rows[leaf][self._row]
        return self._read[leaf]

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
