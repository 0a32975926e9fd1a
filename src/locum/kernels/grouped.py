"""Products of rows with the matrices of a stack, each row with one of them: grouped products, by regime.

    add(y, x, weight, item, token)       y[p]        += weight[item[p]] x[token[p]]
    scatter(y, x, weight, item, token)   y[token[p]] += weight[item[p]] x[p]

Pairs p of one item and one token are one unit: its product is made once, and `scatter` adds up the unit's x first.
Pairs with item -1 are left out. Nothing here asks the device what was routed, so shapes are known beforehand: a graph
can be captured, and torch.compile sees no break. Tokens ascend. `choose` says which way serves; LOOP stands for none of
these: the container then goes through its clusters one by one (clusters.py), with shapes that depend on what was routed.

Letters: P pairs (token, expert), X rows of x, U units, T tokens, N stacked items, O outputs and I inputs of an item.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .products import Products, Remembered


def pick(values_NX: Tensor, row_P: Tensor) -> Tensor:
    """The rows named, and zeros where the row is -1."""
    return torch.where((row_P >= 0)[:, None], values_NX[row_P.clamp(min=0)], 0)


def add_halves(
    way: Products, y_PG: Tensor, inputs: tuple[Tensor, ...], token_P: Tensor, weight_NGD: Tensor, row_P: Tensor
) -> None:
    """The first product: of the one input, or of gate's half of each weight with the first input and up's with the
    second."""
    width = y_PG.shape[1] // len(inputs)
    for i, x_TD in enumerate(inputs):
        half = slice(i * width, (i + 1) * width)
        way.add(y_PG[:, half], x_TD, weight_NGD[:, half], row_P, token_P)


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


def grouped_linear(x_PI: Tensor, weight_NOI: Tensor, counts: list[int]) -> Tensor:
    """Rows of `x`, sorted by item, each times its item's weight: the first counts[0] rows use weight[0], and so on."""
    # One unbind, not an index per item: its gradient is one stack, where each index would cost a whole tensor of zeros.
    pairs = zip(torch.split(x_PI, counts), weight_NOI.unbind(0), strict=True)
    parts = [functional.linear(x, w_OI) for x, w_OI in pairs if x.shape[0]]
    return torch.cat(parts) if parts else x_PI.new_zeros(0, weight_NOI.shape[1])
