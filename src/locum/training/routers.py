"""The routers of a model, in training."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..models.families import find_layers


def router_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the routers of all MoE layers that a gradient can change."""
    for layer in find_layers(model):
        yield from (tensor for tensor in layer.router.parameters() if tensor.is_floating_point())


def train_routers(model: nn.Module) -> None:
    """Freeze all of a model but its routers."""
    model.requires_grad_(False)
    for tensor in router_parameters(model):
        tensor.requires_grad_(True)
