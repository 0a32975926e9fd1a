"""The stack of decoder layers of a model: the outermost list of modules that holds its MoE layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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


def around_experts(model: nn.Module, experts: Sequence[str]) -> dict[str, list[str]]:
    """The tensors beside experts in the decoder layers of the experts modules at these paths: their names in the model.

    A layer that holds two such modules, or shares a tensor with what is outside of it, cannot go alone and is left out.
    """
    try:
        prefix, _ = decoder_stack(model, experts)
    except UnsupportedModel:
        return {}
    places = [place_in(prefix, name) for name in experts]
    tensors, inside = model.state_dict(keep_vars=True), re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    holds: dict[int, list[str]] = {}
    holders: dict[
        int, set[int]
    ] = {}  # of every tensor: the decoder layers that it is in, -1 for what is outside of them
    for name, tensor in tensors.items():
        found = inside.match(name)
        place = int(found[1]) if found else -1
        holds.setdefault(place, []).append(name)
        holders.setdefault(id(tensor), set()).add(place)
    shared = {place for among in holders.values() if len(among) > 1 for place in among}
    alone = {name: i for name, i in zip(experts, places, strict=True) if places.count(i) == 1 and i not in shared}
    return {name: [x for x in holds[i] if not _is_of_experts(x, name)] for name, i in alone.items()}


def _is_of_experts(tensor: str, experts: str) -> bool:
    return tensor.startswith(f"{experts}.") and not tensor.startswith(f"{experts}.post_expert_norm.")


def place_in(prefix: str, name: str) -> int:
    """The index in the list at `prefix` of the module that holds the one at `name`."""
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])
