"""Decoder layers that leave a model: the config without them, and the names and numbers of those that stay.

No family is known here. A config says how many layers there are; lists in it say something of each one, or number some of them.
These are cut. Then the model that such a config describes is compared, layer by layer, with the model of before: where a config
says in some other way which layers are what, such as by a period, a layer would become another one, and that is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedModel
from ..models.decoder_layers import decoder_stack
from ..models.families import find_layers
from ..models.stored import Place
from ..plans.numbering import NUMBERED, Numbering
from .empty_model import skeleton

EACH = re.compile(r"layer|types$|pattern|limits|ratios|freq")  # lists that say something of each layer, by their names
NUMBERS = re.compile(r"layer|ids$|idx|indices|indexes")  # lists that number some of them
OWN_NUMBER = re.compile(r"(.*_)?layer_(idx|id|index|number)")  # what a module calls the number of its layer
Plain = bool | int | float | str | None


def prefix_in_files(model: PreTrainedModel, places: Mapping[str, Place]) -> str:
    """What the files' names of decoder layers have before the number that the model gives them.

    Raises UnsupportedModel where that is not one thing.
    """
    stack = f"{_stack_of(model)[0]}."
    prefixes = set()
    for name, place in places.items():
        if place.name.startswith(stack):
            live, stored = NUMBERED.fullmatch(place.name), NUMBERED.fullmatch(name)
            if stored is None or live is None or stored[2] != live[2]:
                raise UnsupportedModel(
                    f"{name} is not numbered as {place.name}, so no decoder layer can leave the files"
                )
            prefixes.add(stored[1])
    if len(prefixes) != 1:
        raise UnsupportedModel("decoder layers have several names in the files, so none can leave them")
    return prefixes.pop()


def without_layers(config: PreTrainedConfig, numbering: Numbering) -> PreTrainedConfig:
    """A copy of a model's config, of the stock model without these decoder layers.

    Raises UnsupportedModel where it would make another layer of one that stays.
    """
    after = copy.deepcopy(config)
    if hasattr(after, "quantization_config"):
        del after.quantization_config
    before = skeleton(copy.deepcopy(after))
    count = len(_stack_of(before)[1])
    shorten(after.get_text_config(decoder=True), numbering, count)
    try:
        _check_alike(before, skeleton(copy.deepcopy(after)), numbering)
    except (CheckpointError, UnsupportedModel) as error:
        raise UnsupportedModel(
            f"decoder layers of model type {config.model_type!r} cannot be dropped: {error}; drop their experts instead "
            f"(layer-drop)"
        ) from error
    return after


def shorten(config: PreTrainedConfig, numbering: Numbering, count: int) -> None:
    """Take these of `count` decoder layers out of what a config says, in place."""
    for name, value in list(vars(config).items()):
        if name.startswith("_") or "token" in name or not isinstance(value, (list, tuple)):
            continue
        numbers = all(type(x) is int and 0 <= x < count for x in value) and list(value) == sorted({*value})
        if NUMBERS.search(name) and numbers:
            kept = [after for x in value if (after := numbering.after(x)) is not None]
        elif EACH.search(name) and len(value) == count:
            kept = [x for number, x in enumerate(value) if numbering.after(number) is not None]
        else:
            continue
        setattr(config, name, type(value)(kept))
    if getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = count - len(numbering.gone)


def drop_layers(model: PreTrainedModel, numbering: Numbering) -> None:
    """Take these decoder layers out of a live model and what its configs say, in place. `without_layers` knows whether it can be."""
    stack = model.get_submodule(numbering.prefix.rstrip("."))
    kind = type(model.config.get_text_config(decoder=True))
    holders = [
        model.config.get_text_config(decoder=True),
        *(getattr(module, "config", None) for module in model.modules()),
    ]
    for config in {id(holder): holder for holder in holders}.values():
        if type(config) is kind:
            shorten(config, numbering, len(stack))
    for number, layer in enumerate(list(stack)):
        for module, name in _own_numbers(layer, number):
            setattr(module, name, numbering.after(number))
    for number in sorted(numbering.gone, reverse=True):
        del stack[number]


def _stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    return decoder_stack(model, [layer.shape.name for layer in find_layers(model)])


def _own_numbers(layer: nn.Module, number: int) -> Iterator[tuple[nn.Module, str]]:
    for module in layer.modules():
        for name, value in vars(module).items():
            if type(value) is int and value == number and OWN_NUMBER.fullmatch(name):
                yield module, name


def _check_alike(before: PreTrainedModel, after: PreTrainedModel, numbering: Numbering) -> None:
    """Refuse a model whose decoder layers are not those of `before` that stay, or that differs around them."""
    (path, old), (_, new) = _stack_of(before), _stack_of(after)
    kept = [number for number in range(len(old)) if numbering.after(number) is not None]
    if len(new) != len(kept):
        raise UnsupportedModel(f"its config says {len(new)} layers where {len(kept)} are left")
    for now, number in enumerate(kept):
        _compare(f"layer {number}", _facts(old[number], number), _facts(new[now], now))
    around = [
        {n: tuple(t.shape) for n, t in m.state_dict().items() if not n.startswith(f"{path}.")} for m in (before, after)
    ]
    _compare("what is around the layers", *around)


def _compare(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            raise UnsupportedModel(
                f"{what} has {name}={before.get(name)!r}, and {after.get(name)!r} in a model without them"
            )


def _facts(layer: nn.Module, number: int) -> dict[str, Any]:
    """What tells a layer from others: classes, shapes of tensors, and plain values but for its number."""
    own = {(id(module), name) for module, name in _own_numbers(layer, number)}
    facts: dict[str, Any] = {f"tensor {name}": tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    for path, module in layer.named_modules():
        facts[f"class of {path or 'the layer'}"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, Plain) and not name.startswith("_") and (id(module), name) not in own:
                facts[f"{path}.{name}".removeprefix(".")] = value
    return facts
