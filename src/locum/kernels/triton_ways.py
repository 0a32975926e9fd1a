"""Triton's ways of making products: by a call, or by operators that torch.compile does not look into; and their trial.

Letters: P pairs (token, expert), X rows of x, T tokens, N stacked items, O outputs and I inputs of an item, Y bytes of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.rows import pack, row_format
from . import triton_grouped
from .packed import Matrices, Packed
from .products import Products
from .triton_grouped import Weights, products

OFF = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}  # of the largest result


# Each operator groups pairs for itself. What is in few bits comes as its bytes and what they are.
@torch.library.custom_op("locum::triton_add", mutates_args=("y_PO",))
def add_op(y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    products().add(y_PO, x_XI, weight_NOI, item_P, token_P)


@torch.library.custom_op("locum::triton_scatter", mutates_args=("y_TO",))
def scatter_op(y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    products().scatter(y_TO, x_PI, weight_NOI, item_P, token_P)


@torch.library.custom_op("locum::triton_add_packed", mutates_args=("y_PO",))
def add_packed_op(
    y_PO: Tensor,
    x_XI: Tensor,
    bytes_NY: Tensor,
    format: str,
    sizes: list[int],
    item_P: Tensor,
    token_P: Tensor,
) -> None:
    products().add(y_PO, x_XI, _packed(bytes_NY, format, sizes), item_P, token_P)


@torch.library.custom_op("locum::triton_scatter_packed", mutates_args=("y_TO",))
def scatter_packed_op(
    y_TO: Tensor,
    x_PI: Tensor,
    bytes_NY: Tensor,
    format: str,
    sizes: list[int],
    item_P: Tensor,
    token_P: Tensor,
) -> None:
    products().scatter(y_TO, x_PI, _packed(bytes_NY, format, sizes), item_P, token_P)


def _packed(bytes_NY: Tensor, format: str, sizes: list[int]) -> Packed:
    outputs, inputs, first, rows = sizes
    return Packed(bytes_NY, format, (outputs, inputs), first, rows)


def _by(
    whole: Callable[..., None], packed: Callable[..., None]
) -> Callable[[Tensor, Tensor, Weights, Tensor, Tensor], None]:
    def call(y: Tensor, x: Tensor, weight_NOI: Weights, item_P: Tensor, token_P: Tensor) -> None:
        if isinstance(weight_NOI, Packed):
            sizes = [*weight_NOI.whole, weight_NOI.first, weight_NOI.shape[1]]
            packed(y, x, weight_NOI.bytes_NY, weight_NOI.format, sizes, item_P, token_P)
        else:
            whole(y, x, weight_NOI, item_P, token_P)

    return call


def operators() -> Products:
    return Products(_by(add_op, add_packed_op), _by(scatter_op, scatter_packed_op))


PRODUCTS = {"triton": products, "triton op": operators}


def fault(kind: Matrices, dtype: torch.dtype, device: str = "cuda") -> str:
    """What is wrong with the products of random matrices of a kind, for few pairs and for many; "" if nothing is."""
    format, *tried = kind
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(tried, generator=generator).to(device) for _ in range(3))
    weight = Packed(torch.stack([pack(format, row_format(format).write(one)) for one in drawn]), format, tuple(tried))
    numbers_NOI, found = weight.numbers(dtype).double(), []
    for pairs in (12, triton_grouped.FEW_PAIRS + 12):
        item_P = torch.randint(-1, 3, (pairs,), generator=generator).to(device)
        token_P = torch.arange(pairs, device=device) // 3
        x_XI = torch.randn(pairs, tried[1], generator=generator).to(device, dtype)
        y_PO = torch.zeros(pairs, tried[0], dtype=dtype, device=device)
        products().add(y_PO, x_XI, weight, item_P, token_P)
        exact_PO = torch.bmm(numbers_NOI[item_P.clamp(min=0)], x_XI.double()[token_P][:, :, None])[:, :, 0]
        exact_PO = torch.where((item_P >= 0)[:, None], exact_PO, 0)
        off = float((y_PO.double() - exact_PO).abs().max() / exact_PO.abs().max())
        if not off < OFF[dtype]:
            found.append(f"{pairs} pairs are off by {off:.2g}")
    return ", ".join(found)
