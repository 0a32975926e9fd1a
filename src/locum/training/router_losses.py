"""Losses that training adds on what routers say, each weighed by the option of its name: one file for each, and a line here.

Letters: B blocks, S tokens of a block, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..models.families import find_layers
from ..models.routing import Routed, Routing, watched
from .alignment import alignment, grouping
from .balance import load_balance, p_penalty, running_balance
from .entropy import router_entropy
from .options import Recovery

LOSSES: dict[str, Callable[[Routed, Tensor], Tensor]] = {
    "balance": load_balance,
    "running_balance": running_balance,
    "p_penalty": p_penalty,
    "alignment": alignment,
    "entropy": router_entropy,
}


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


def check_router_losses(model: nn.Module, options: Recovery) -> None:
    """Refuse a loss that would be 0 whatever the routers do. Raises OptionError."""
    layouts = [getattr(layer.experts, "layout", None) for layer in find_layers(model)]
    if options.alignment and not any(layout and grouping(layout.routing) for layout in layouts):
        raise OptionError(
            "--alignment aligns the experts chosen in groups with the best of all, and no layer chooses in groups "
            "(--method groups lets it); leave it out"
        )


@contextlib.contextmanager
def router_losses(model: nn.Module, options: Recovery) -> Iterator[RouterLosses]:
    """Watch the routers of a model while this is entered, if a loss has a weight."""
    weights = {name: weight for name in LOSSES if (weight := getattr(options, name))}
    with watched(model) if weights else contextlib.nullcontext() as routing:
        yield RouterLosses(weights, routing)
