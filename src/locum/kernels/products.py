"""What a way of making grouped products offers to those who use it.

    add(y, x, weight, item, token)       y[p]        += weight[item[p]] x[token[p]]
    scatter(y, x, weight, item, token)   y[token[p]] += weight[item[p]] x[p]

Letters: P pairs (token, expert), N stacked items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Products(NamedTuple):
    add: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]
    scatter: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


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
