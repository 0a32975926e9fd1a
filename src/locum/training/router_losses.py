"""Losses that training adds on what routers say, each weighed by the option of its name: one file for each, and a line here.

Letters: B blocks, S tokens of a block, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..models.routing import Routed, Routing, watched
from .balance import load_balance
from .entropy import router_entropy
from .options import Recovery

LOSSES: dict[str, Callable[[Routed, Tensor], Tensor]] = {"balance": load_balance, "entropy": router_entropy}


class RouterLosses:
    """The losses that a run asked for, of the pass that was just made."""

    def __init__(self, weights: dict[str, float], routing: Routing | None) -> None:
        self.weights, self.routing = weights, routing

    def of(self, attention_BS: Tensor) -> dict[str, Tensor]:
        """Each loss by its name, the mean over the layers."""
        return {name: self._mean(LOSSES[name], attention_BS.reshape(-1)) for name in self.weights}

    def _mean(self, loss: Callable[[Routed, Tensor], Tensor], mask_T: Tensor) -> Tensor:
        found = [loss(self.routing.of(layer), mask_T) for layer in self.routing.layers]
        return torch.stack([each.to(found[0].device) for each in found]).mean()


@contextlib.contextmanager
def router_losses(model: nn.Module, options: Recovery) -> Iterator[RouterLosses]:
    """Watch the routers of a model while this is entered, if a loss has a weight."""
    weights = {name: weight for name in LOSSES if (weight := getattr(options, name))}
    with watched(model) if weights else contextlib.nullcontext() as routing:
        yield RouterLosses(weights, routing)
