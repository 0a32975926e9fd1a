"""Parameters side by side along the first axis: one row for each item of a kind. Matrices in few bits are rows of bytes.

Letters: N stacked items.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..formats.rows import is_packed
from ..kernels import few_bits, native
from ..kernels.packed import Packed, coding


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
        return few_bits.numbers(self.packed[row], self.format, self.shape, self.dtype)


def as_numbers(stacked: Tensor, format: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | Matrices:
    """A tensor of a stack by its rows, as numbers of this shape."""
    return Matrices(stacked, format, shape, dtype) if is_packed(format, shape) else stacked


class Row(Mapping[str, Tensor]):
    """One row of every tensor of a stack; what is in few bits is read once, when it is asked for."""

    def __init__(self, rows: Mapping[str, Matrices | tuple[Tensor, ...]], row: int, shared: Row | None = None) -> None:
        self._rows, self._row, self._shared = rows, row, shared  # `shared`: what its products read of another stack
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, leaf: str) -> Tensor:
        if self._shared is not None and leaf not in self._rows:
            return self._shared[leaf]
        if leaf not in self._read:
            self._read[leaf] = self._rows[leaf][self._row]
        return self._read[leaf]

    def alone(self, leaf: str) -> Tensor | Packed:
        """A matrix as a stack of one, in few bits where the compiled products read its bytes."""
        rows = self._rows.get(leaf)
        if isinstance(rows, Matrices) and native.knows(rows.format) and coding(rows.format, *rows.shape) is not None:
            return Packed(rows.packed[self._row][None], rows.format, (rows.shape[0], rows.shape[1]))
        return self[leaf][None]

    def dtype(self, leaf: str) -> torch.dtype:
        """In what a tensor is multiplied."""
        rows = self._rows.get(leaf)
        return rows.dtype if isinstance(rows, Matrices) else self[leaf].dtype

    @property
    def is_packed(self) -> bool:
        own = any(isinstance(rows, Matrices) for rows in self._rows.values())
        return own or (self._shared is not None and self._shared.is_packed)

    def keep(self, saved: Tensor) -> Any:
        """What autograd keeps in place of a tensor."""
        for leaf, numbers in self._read.items():
            rows = self._rows[leaf]
            if isinstance(rows, Matrices) and _place(saved) == _place(numbers):
                return _Again(rows, self._row, saved.shape, saved.stride(), saved.storage_offset())
        return saved if self._shared is None else self._shared.keep(saved)

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._rows or (self._shared is not None and leaf in self._shared)

    def __iter__(self) -> Iterator[str]:
        yield from self._rows
        yield from self._shared or ()

    def __len__(self) -> int:
        return len(self._rows) + len(self._shared or ())


class _Again(NamedTuple):
    """How a tensor that was numbers of a row, or some of them, is made again of the row's bytes."""

    rows: Matrices
    row: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def keeping_bytes(row: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[object]:
    """While it is entered, autograd keeps a row's bytes in place of numbers that were made of them: backward makes these again.

    A frozen matrix is kept for the gradient of its inputs. All of a layer's as numbers would take what packing saves.
    """
    grows = torch.is_grad_enabled() and isinstance(row, Row) and row.is_packed
    if not grows or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    known = weakref.ref(row)  # autograd holds on to the function, and so would to the numbers
    return saved_tensors_hooks(lambda saved: known().keep(saved), _numbers)


def _numbers(kept: Any) -> Tensor:
    if not isinstance(kept, _Again):
        return kept
    return kept.rows[kept.row].as_strided(kept.shape, kept.stride, kept.offset)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
