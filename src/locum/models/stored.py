"""The dtypes that tensors have in files: what was read in bfloat16 is written in bfloat16, whatever it is in memory.

transformers loads a model in the dtype that its config names, and some tensors in float32 whatever their file holds: from
5.24 on also the routers of many families. Loading notes on the model what its files hold, where that differs; sizes are
counted by the note and files are written by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..containers.container import StandInExperts
from ..formats.plain import FLOAT_ENTRIES
from .families import is_stock_experts

NOTE = "_locum_stored"  # the attribute of a live model: what its files hold, by the names of its tensors and modules
ONE_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Stored:
    """The dtype of a tensor in the files, and its place where one tensor of one file is all of it."""

    dtype: torch.dtype
    file: Path | None = None
    name: str = ""


def note_stored(model: PreTrainedModel, headers: Mapping[Path, Mapping[str, Any]]) -> None:
    """Note on a model what its files hold, if any tensor is in another dtype in memory. `headers` are those of the files."""
    live = {name: t for name, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}
    noted = _in_files(model, headers)
    for tied, source in model.all_tied_weights_keys.items():
        if source in noted:
            noted.setdefault(tied, noted[source])
    if all(tensor.dtype == noted[name].dtype for name, tensor in live.items() if name in noted):
        return
    for module_name, module in model.named_modules():  # what stands in for experts is stored as they are
        if is_stock_experts(module) or isinstance(module, StandInExperts):
            names = (f"{module_name}.{name}" for name in module.state_dict())
            if own := [noted[name] for name in names if name in noted]:
                noted[module_name] = Stored(_widest(own))
    if len({stored.dtype for stored in noted.values()}) == 1:  # so are tensors that files hold in parts of others
        noted[""] = Stored(_widest(noted.values()))
    setattr(model, NOTE, noted)


def _in_files(model: PreTrainedModel, headers: Mapping[Path, Mapping[str, Any]]) -> dict[str, Stored]:
    """What files hold by the names of a live model. Experts of one layer, which files number, are renamed together."""
    alike: dict[str, list[Stored]] = {}
    for file, header in headers.items():
        for name, entry in header.items():
            if entry["dtype"] in FLOAT_ENTRIES:
                stored = Stored(FLOAT_ENTRIES[entry["dtype"]], file, name)
                alike.setdefault(ONE_EXPERT.sub("0", name), []).append(stored)
    found: dict[str, list[Stored]] = {}
    for name, live_name in live_names(model, alike).items():
        found.setdefault(live_name, []).extend(alike[name])
    return {name: all_[0] if len(all_) == 1 else Stored(_widest(all_)) for name, all_ in found.items()}


def _widest(stored: Iterable[Stored]) -> torch.dtype:
    return max((x.dtype for x in stored), key=lambda dtype: dtype.itemsize)


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file goes in a live model, and what changes it or joins it with others on its way, if anything."""

    name: str
    converter: WeightConverter | None = None
    pattern: str = ""  # of the converter's, that the tensor's name fits

    @property
    def converted(self) -> bool:
        return self.converter is not None


def live_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names that tensors of files have in a live model, as `from_pretrained` finds them; without those it leaves out."""
    return {name: place.name for name, place in places_of(model, names).items()}


def converts_to_several(model: PreTrainedModel) -> bool:
    """Whether some tensor of the files becomes several of the model: its place is then that of the first."""
    mapping = get_model_conversion_mapping(model)
    return any(isinstance(x, WeightConverter) and len(x.target_patterns) > 1 for x in mapping)


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Place]:
    """The places that tensors of files have in a live model, as `live_names`. Experts of a layer that become one tensor
    are renamed together: a checkpoint may have a hundred thousand of them."""
    of_one = {name: ONE_EXPERT.sub("0", name) for name in names}
    together = _places_of_each(model, set(of_one.values()))
    joined = {name for name, place in together.items() if place.converted}
    apart = _places_of_each(model, {name for name, one in of_one.items() if one != name and one not in joined})
    found = {n: apart.get(n) if one != n and one not in joined else together.get(one) for n, one in of_one.items()}
    return {name: place for name, place in found.items() if place is not None}


def _places_of_each(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Place]:
    known, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings wait for the first of a group
        live_name, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if live_name not in known and name in known:
            live_name, pattern = name, None
        if live_name in known:
            found[name] = Place(live_name) if pattern is None else Place(live_name, by_pattern[pattern], pattern)
    return found


def _stored(model: nn.Module, name: str) -> Stored | None:
    """What the files hold of a tensor; of one that they do not have, what is noted of the module around it."""
    noted: dict[str, Stored] = getattr(model, NOTE, {})
    while name and name not in noted:
        name = name.rpartition(".")[0]
    return noted.get(name)


def stored_dtype(model: nn.Module, name: str, tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor of a live model is written."""
    stored = _stored(model, name) if tensor.is_floating_point() else None
    return tensor.dtype if stored is None else stored.dtype


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors in the dtypes of its files. Tied ones stay one; what nobody changed is what was read, to the bit."""
    tensors = model.state_dict()
    made: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    for name, tensor in tensors.items():
        dtype = stored_dtype(model, name, tensor)
        if dtype != tensor.dtype:
            key = (tensor.data_ptr(), tensor.shape, dtype)
            if key not in made:
                made[key] = _as_stored(tensor, dtype, _stored(model, name))
            tensors[name] = made[key]
    return tensors


def _as_stored(tensor: Tensor, dtype: torch.dtype, stored: Stored | None) -> Tensor:
    """A tensor in the dtype of its file. Of a wider one, memory holds it rounded: if that is all, the file's own is taken."""
    if dtype.itemsize > tensor.dtype.itemsize and stored is not None and stored.file and stored.file.is_file():
        with safe_open(stored.file, "pt") as file:
            original = file.get_tensor(stored.name)
        if original.shape == tensor.shape and torch.equal(original.to(tensor.dtype), tensor.cpu()):
            return original
    return tensor.to(dtype)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, every tensor in the dtype of the file that it was read from."""
    model.save_pretrained(folder, state_dict=stored_tensors(model) if hasattr(model, NOTE) else None)
