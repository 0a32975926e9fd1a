"""Tensors of files as a live model has them, and back, by transformers' own conversion mapping, a few of them at a time.

Loading a model notes on it which conversions its files needed, and saving turns those around. Here that is done for a model
whose weights are in no memory, so that what is written has the names that saving the live model would give it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from .stored import ONE_EXPERT, Place


def converted(model: PreTrainedModel, tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Tensors of files, by their names there, as the live model has them. All that are joined with others must be there."""
    groups: dict[str, list[str]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        groups.setdefault(places[name].name, []).append(name)
    live: dict[str, Tensor] = {}
    for live_name, names in groups.items():
        converter = places[names[0]].converter
        if converter is None:
            live[live_name] = tensors[names[0]]
            continue
        own = copy.deepcopy(converter)
        for name in names:
            own.add_tensor(live_name, name, places[name].pattern, tensors[name])
        live |= _unlisted(own.convert(live_name, model=model, config=model.config))
    return live


def _unlisted(made: Mapping[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def note_conversions(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Note on a model the conversions that files with tensors of these names need, as loading them does."""
    mapping, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    for name in sorted({ONE_EXPERT.sub("0", name) for name in names}, key=dot_natural_key):
        rename_source_key(name, renamings, converters, model.base_model_prefix, known)
    model._weight_conversions = [conversion for conversion in mapping if conversion.was_used()]


def save_as_stock(model: PreTrainedModel) -> None:
    """Let saving split experts into the tensors that the family's files have, which other engines read.

    Containers have other tensors, so what was noted on loading some does not say how experts are split.
    """
    used = [(c.source_patterns, c.target_patterns) for c in getattr(model, "_weight_conversions", None) or ()]
    model._weight_conversions = [
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, PrefixChange) or (conversion.source_patterns, conversion.target_patterns) in used
    ]


def as_in_files(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a live model, by their names there, as saving it writes them."""
    return _unlisted(revert_weight_conversion(model, dict(tensors)))


def names_in_files(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """The names in files of tensors that saving renames and no more."""
    marked = {name: torch.empty(0, device="meta") for name in names}
    saved = {id(tensor): name for name, tensor in as_in_files(model, marked).items()}
    return {name: saved[id(tensor)] for name, tensor in marked.items()}


def named_alike(model: PreTrainedModel, names: Mapping[str, str], part: str) -> list[str]:
    """Of tensors of files, by their names in the live model, those of which a `part` (such as weight_scale for weight) is renamed as
    they are. Some families rename a tensor by its whole name, and a part of it would be lost."""
    mapping = get_model_conversion_mapping(model)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    parts = {name: (_beside(name, part), _beside(live, part)) for name, live in names.items()}
    known = {**model.state_dict(), **{live: None for _, live in parts.values()}}
    found = []
    for name, (in_file, live) in parts.items():
        renamed, _ = rename_source_key(in_file, renamings, converters, model.base_model_prefix, known)
        if renamed == live:
            found.append(name)
    return found


def _beside(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"
