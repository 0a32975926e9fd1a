"""Products of rows with the matrices of a stack, each row with one of them: grouped products, by regime.

    add(y, x, weight, item, token)       y[p]        += weight[item[p]] x[token[p]]
    scatter(y, x, weight, item, token)   y[token[p]] += weight[item[p]] x[p]

Pairs p of one item and one token are one unit: its product is made once, and `scatter` adds up the unit's x first.
Pairs with item -1 are left out. Nothing here asks the device what was routed, so shapes are known beforehand: a graph
can be captured, and torch.compile sees no break. Tokens ascend. `choose` says which way serves; LOOP stands for none of
these: the container then goes through its clusters one by one (clusters.py), with shapes that depend on what was routed.

Letters: P pairs, X rows of x, U units, T tokens, N items, O outputs and I inputs of an item.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import native

# Measured on one core of an EPYC with avx512_bf16, shared with other work: 16 matrices of 2048 x 2048 (134 MB) in bfloat16,
# each times M rows; milliseconds of the core's time, the fastest of six. Reading them takes 6, their operations 0.7 M.
#   M                    1     4     8    16    32    64   128
#   torch grouped_mm    16    15    17    22    34    53    93
#   native               6     7    10    15    28    52   100
# With small matrices (32 experts of 256 x 96) native is ahead at 128 rows too, 9.5 against 10.8 to 14, in float32 as well.
# From 96 rows of an item on, native turns matrices round (native.cpp): 16 matrices of 2048 x 2048, 460 rows each, took
# 164 ms of two cores (376 GFLOP/s, gathering and adding included) where rows read straight took 189. With so many rows the
# container goes cluster by cluster, and what lies between the products stays in the cache: identity plan, 1,024 tokens,
# 315 ms against 342; 512 tokens 176 against 179; 256 tokens 129 against 116.
NATIVE_ROWS = 64  # the most rows per expert, on average
# Low-rank experts make twice as many products, of half the size or less: with mean rank 512, 256 rows per expert took 600
# ms against 881 in the loop, 768 rows 2294 against 1740.
LOW_RANK_ROWS = 384
# A matrix gathered for every pair is written and read once more, so this is for small graphs that nothing else can hold.
GATHERED_PAIRS = 64
LOOP = "loop"
# The first way that serves and has room for the pairs is taken. Not measured yet: `make gpu` is where "triton" would be.
CUDA_WAYS = (("grouped", math.inf), ("gathered", GATHERED_PAIRS))
TRITON_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


class Products(NamedTuple):
    add: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]
    scatter: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


def choose(
    device: torch.device, dtype: torch.dtype, pairs: int, experts: int, aligned: bool, low_rank: bool = False
) -> str:
    """The way to make a layer's products: one of PRODUCTS, or LOOP.

    `aligned`: every row of every matrix has a multiple of 16 bytes, which torch's grouped product asks for. `low_rank`:
    most experts have no dense row.
    """
    if device.type == "cpu" and dtype in native.FORMATS and not torch.is_grad_enabled():
        if pairs <= (LOW_RANK_ROWS if low_rank else NATIVE_ROWS) * experts and native.available():
            return "native op" if torch.compiler.is_compiling() else "native"
    elif device.type == "cuda":
        way = next((way for way, most in CUDA_WAYS if pairs <= most and _serves(way, dtype, aligned)), LOOP)
        return "triton op" if way == "triton" and torch.compiler.is_compiling() else way
    if pairs <= GATHERED_PAIRS and torch.compiler.is_compiling():
        return "gathered"
    return LOOP


def _serves(way: str, dtype: torch.dtype, aligned: bool) -> bool:
    if way == "triton":  # no gradients; and it comes with CUDA builds of torch only
        return dtype in TRITON_FORMATS and not torch.is_grad_enabled() and triton_is_there()
    return way != "grouped" or (dtype == torch.bfloat16 and aligned)


@torch.compiler.assume_constant_result
def triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def pick(values_NX: Tensor, row_P: Tensor) -> Tensor:
    """The rows named, and zeros where the row is -1."""
    return torch.where((row_P >= 0)[:, None], values_NX[row_P.clamp(min=0)], 0)


def _times(weight_NOI: Tensor, x_PI: Tensor, item_P: Tensor) -> Tensor:
    product_PO = torch.bmm(weight_NOI[item_P.clamp(min=0)], x_PI[:, :, None]).squeeze(2)
    return torch.where((item_P >= 0)[:, None], product_PO, 0)


def gathered_add(y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    y_PO.add_(_times(weight_NOI, x_XI[token_P], item_P))


def gathered_scatter(y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    y_TO.index_add_(0, token_P, _times(weight_NOI, x_PI, item_P).to(y_TO.dtype))


class Units(NamedTuple):
    """P units are kept room for; those that are none come last and have item N."""

    order_P: Tensor  # pairs by item and token, those left out last
    unit_P: Tensor  # the unit of each pair in that order
    item_U: Tensor
    token_U: Tensor
    ends_N: Tensor  # where each item's units end

    @classmethod
    def of(cls, item_P: Tensor, token_P: Tensor, num_items: int, num_tokens: int) -> Units:
        key_P, order_P = torch.sort(torch.where(item_P < 0, num_items, item_P) * num_tokens + token_P, stable=True)
        fresh_P = torch.ones_like(key_P)
        fresh_P[1:] = key_P[1:] != key_P[:-1]
        unit_P = fresh_P.cumsum(0) - 1
        item_U = torch.full_like(key_P, num_items).scatter(0, unit_P, key_P // num_tokens)
        token_U = torch.zeros_like(key_P).scatter(0, unit_P, key_P % num_tokens)
        ends_N = torch.searchsorted(item_U, torch.arange(num_items, device=item_P.device), right=True)
        return cls(order_P, unit_P, item_U, token_U, ends_N.to(torch.int32))

    def times(self, weight_NOI: Tensor, x_UI: Tensor) -> Tensor:
        """Zero where a unit is none: there the grouped product, and its gradient, leave what was in memory."""
        is_one_U1 = (self.item_U < len(weight_NOI))[:, None]
        product_UO = functional.grouped_mm(torch.where(is_one_U1, x_UI, 0), weight_NOI.mT, offs=self.ends_N)
        return torch.where(is_one_U1, product_UO, 0)


class Remembered:
    """How pairs are grouped, made once for the products of one forward call that share their very items and tokens."""

    def __init__(self, make: Callable[[Tensor, Tensor, int, int], Any]) -> None:
        self._make, self._known = make, []

    def __call__(self, item_P: Tensor, token_P: Tensor, num_items: int, num_tokens: int) -> Any:
        for item, token, items, found in self._known:
            if item is item_P and token is token_P and items == num_items:
                return found
        found = self._make(item_P, token_P, num_items, num_tokens)
        self._known.append((item_P, token_P, num_items, found))
        return found


def grouped_add(
    units_of: Remembered, y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor
) -> None:
    units = units_of(item_P, token_P, len(weight_NOI), len(x_XI))
    product_UO = units.times(weight_NOI, x_XI[units.token_U])
    y_PO.index_add_(0, units.order_P, product_UO[units.unit_P])


def grouped_scatter(
    units_of: Remembered, y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor
) -> None:
    units = units_of(item_P, token_P, len(weight_NOI), len(y_TO))
    x_UI = torch.zeros_like(x_PI).index_add_(0, units.unit_P, x_PI[units.order_P])
    y_TO.index_add_(0, units.token_U, units.times(weight_NOI, x_UI).to(y_TO.dtype))


def grouped() -> Products:
    units_of = Remembered(Units.of)
    return Products(functools.partial(grouped_add, units_of), functools.partial(grouped_scatter, units_of))


def by_triton(way: str) -> Products:
    from . import triton_grouped

    return triton_grouped.PRODUCTS[way]()


# Of each way, what makes its products for one forward call.
NATIVE = Products(native.add_, native.scatter_)
PRODUCTS: dict[str, Callable[[], Products]] = {
    "native": lambda: NATIVE,
    "native op": lambda: Products(native.add_op, native.scatter_op),
    "grouped": grouped,
    "gathered": lambda: Products(gathered_add, gathered_scatter),
    "triton": lambda: by_triton("triton"),
    "triton op": lambda: by_triton("triton op"),
}


def grouped_linear(x_PI: Tensor, weight_NOI: Tensor, counts: list[int]) -> Tensor:
    """Rows of `x`, sorted by item, each times its item's weight: the first counts[0] rows use weight[0], and so on."""
    # One unbind, not an index per item: its gradient is one stack, where each index would cost a whole tensor of zeros.
    pairs = zip(torch.split(x_PI, counts), weight_NOI.unbind(0), strict=True)
    parts = [functional.linear(x, w_OI) for x, w_OI in pairs if x.shape[0]]
    return torch.cat(parts) if parts else x_PI.new_zeros(0, weight_NOI.shape[1])
