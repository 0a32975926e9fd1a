"""Whether files and config.json of a checkpoint describe one model: asked of headers, before anything is built or allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..models.families import unread_tensors
from ..models.stored import ONE_EXPERT, Place, converts_to_several, places_of

Headers = Mapping[str, Mapping[str, Any]]

# Entries of config.json that say how much there is of something. Of layers, something is built for each.
LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|(en|de)coder_layers|depth")
SIZE = re.compile(r"\w*(size|dim|dims|width|rank|channels|heads|experts|embd|d_model|d_ff)")
MOST_LAYERS, MOST_NUMBERS = 1000, 2**20  # that are believed whatever the files hold: an adapter's hold few
SCALES = re.compile(r"(scales?|scale_inv|zeros|zero_point|absmax|quant_map|packed|qweight|g_idx|_blocks)$")
LAYER = re.compile(r"\blayers\.(\d+)\.")


def check_sizes(entries: Mapping[str, Any], where: str, headers: Sequence[Headers] = ()) -> None:
    """Refuse sizes in a config that no such files can fill. `headers` of the files, where they are known already."""
    found = [math.prod(entry["shape"]) for header in headers for entry in header.values()]
    layers, numbers = max(len(found), MOST_LAYERS), max(sum(found), MOST_NUMBERS)
    for key, value in entries.items():
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            check_sizes(value, f"{where}, {key},", headers)
        elif type(value) is not int:
            continue
        elif LAYERS.fullmatch(key) and value > layers:
            said = f"{len(found):,} tensors" if found else "no model has so many"
            raise CheckpointError(f"{where} says {key}={value:,} ({said}); {RESTORE}")
        elif SIZE.fullmatch(key) and value > numbers and found:
            raise CheckpointError(
                f"{where} says {key}={value:,}, and its files hold {sum(found):,} numbers in all; {RESTORE}"
            )


RESTORE = "restore the config.json that was written with the weights"


def check_fit(path: str | Path, model: PreTrainedModel, headers: Headers) -> None:
    """Refuse files whose tensors are not those of the model that config.json describes. `model` has no weights."""
    try:
        places = check_shapes(model, headers)
        _check_places(model, headers, places)
        _check_complete(model, places)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_shapes(model: PreTrainedModel, headers: Headers) -> dict[str, Place]:
    """Refuse tensors of another shape than the model's, and a model that is larger than all of them. Returns their places."""
    places = places_of(model, headers)
    live = model.state_dict(keep_vars=True)
    for name, entry in headers.items():
        place = places.get(name)
        if place is not None and not place.converted:
            check_shape(name, tuple(entry["shape"]), tuple(live[place.name].shape))
    _check_numbers(live, headers, places)
    _check_alike(live, headers, {name: place.name for name, place in places.items() if place.converted})
    needed = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in live.values()}.values())
    found = sum(math.prod(entry["shape"]) for entry in headers.values())
    if needed > 2 * found + MOST_NUMBERS:
        raise CheckpointError(
            f"tensors are missing: config.json describes {needed:,} numbers, the files hold {found:,}; fetch it again"
        )
    return places


def _check_numbers(live: Mapping[str, Any], headers: Headers, places: Mapping[str, Place]) -> None:
    """Refuse whole numbers where the model computes, and the other way round: read as the others, they are noise."""
    for name, place in places.items():
        kind, computed = headers[name]["dtype"], live[place.name].is_floating_point()
        if kind.startswith(("I", "U", "BOOL")) == computed:
            raise CheckpointError(
                f"{name} holds numbers of dtype {kind} in the file, where the model has "
                f"{str(live[place.name].dtype).removeprefix('torch.')}; fetch it again"
            )


def _check_alike(live: Mapping[str, Any], headers: Headers, places: Mapping[str, str]) -> None:
    """Refuse experts of a layer that differ in shape, have too many dimensions or too few to be stacked, or of which one is missing."""
    firsts: dict[str, str] = {}
    for name, live_name in places.items():
        if not ONE_EXPERT.search(name):
            continue
        shape, dims = headers[name]["shape"], live[live_name].dim() - 1
        if len(shape) != dims:
            raise CheckpointError(
                f"{name} has shape {shape} in the file, and the tensor of one expert has {dims} dimensions; fetch it again"
            )
        like = firsts.setdefault(ONE_EXPERT.sub("0", name), name)
        if shape != headers[like]["shape"]:
            raise CheckpointError(
                f"{name} has shape {shape} in the file, but {like} has {headers[like]['shape']}, and experts of a layer "
                f"have one shape; fetch it again"
            )
    for key, first in firsts.items():
        every = (ONE_EXPERT.sub(str(e), key) for e in range(live[places[first]].shape[0]))
        if missing := [name for name in every if name not in headers]:
            raise CheckpointError(f"{len(missing)} tensors are missing (first: {missing[0]}); fetch it again")


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the model that config.json describes gives it."""
    if found != expected:
        raise CheckpointError(
            f"{name} has shape {list(found)} in the file, but config.json lays out {list(expected)}; fetch it again"
        )


def _check_places(model: PreTrainedModel, headers: Headers, places: Mapping[str, Place]) -> None:
    """Refuse tensors that the model has no place for, but for those that transformers leaves out on purpose."""
    known = unread_tensors(model, headers)
    if lost := sorted(name for name in headers if name not in places and name not in known):
        raise CheckpointError(
            f"{len(lost)} tensors have no place in the model that config.json describes (first: {lost[0]}): "
            f"{_what(lost, model)}"
        )


def _what(lost: list[str], model: PreTrainedModel) -> str:
    """What tensors without a place are, and what to do."""
    if any(SCALES.search(name) for name in lost):
        return (
            "they look like scales of quantised weights, and config.json has no quantization_config that says how to read "
            "them in a number format that is known (locum list formats); give the config.json that was written with them, or "
            "a checkpoint with weights in 16 or 32 bits"
        )
    if any("lora_" in name for name in lost):
        return "they are an adapter's; merge it into its model first (merge_and_unload) and save the whole"
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    if any(int(number) >= layers for name in lost for number in LAYER.findall(name)):
        return (
            f"they are of layers past the {layers} of config.json; restore num_hidden_layers, or, where they predict further "
            f"tokens, num_nextn_predict_layers"
        )
    return f"no {model.config.model_type} has such; give the config.json that was written with them, or remove them"


def _check_complete(model: PreTrainedModel, places: Mapping[str, Place]) -> None:
    """Refuse a checkpoint that lacks tensors, where headers can tell: one converter may make several of one."""
    if converts_to_several(model):
        return
    found = {place.name for place in places.values()}
    ties = model.all_tied_weights_keys.items()
    found |= {name for tied, source in ties if {tied, source} & found for name in (tied, source)}
    may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [n for n in model.state_dict() if n not in found and not any(re.search(x, n) for x in may_lack)]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing (first: {min(missing)}); fetch it again")
