"""The stack of decoder layers of a model: the outermost list of modules that holds its MoE layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import UnsupportedModel


def decoder_stack(model: nn.Module, experts: Iterable[str]) -> tuple[str, nn.ModuleList]:
    """The path of the list that holds modules with these paths, and the list. Raises UnsupportedModel where no one list does."""
    names = list(experts)
    parts = names[0].split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    prefix = ".".join(parts[:number])
    stack = model.get_submodule(prefix) if number else None
    if not isinstance(stack, nn.ModuleList) or not all(name.startswith(f"{prefix}.") for name in names):
        raise UnsupportedModel("its MoE layers are in no one stack of decoder layers")
    return prefix, stack


def place_in(prefix: str, name: str) -> int:
    """The index in the list at `prefix` of the module that holds the one at `name`."""
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])
