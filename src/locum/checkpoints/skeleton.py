"""The model of a checkpoint without its weights, and the sizes that follow from it.

`open_source` is the one reading of a folder: which files, which tensors, which dtype. Sizes and loading both go by it.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..errors import CheckpointError, OptionError, UnsupportedModel
from ..formats.format import declared_formats, format_of
from ..formats.plain import FLOAT_ENTRIES
from ..models.families import MoeLayer, check_supported, find_layers, model_class, notes_on, unread_tensors
from ..models.sizes import expert_itemsize, shape_of, stored_shapes
from ..models.stored import Place, live_names, note_stored, places_of
from ..shapes import Aside, ModelShape
from .cuts import LayerCuts, find_cuts
from .fit import check_fit, check_sizes
from .inside import read_json
from .packed import Packed, find_packed, seen
from .prediction import Followers, find_followers
from .quantizer import LocumConfig, place_containers, read_layout
from .read import base_of, file_headers, first_line, read_config
from .weight_files import is_adapter, other_weights

COMPARED = 2**22  # numbers of two matrices that are in memory at a time


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, in the dtypes it will have when loaded, containers in place."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    layers, cls = _locum_layers(config), model_class(config)
    try:
        with torch.device("meta"):
            model = cls._from_config(config, dtype=dtype)
    except Exception as error:  # every family builds itself in its own way
        raise CheckpointError(
            f"transformers cannot build what config.json describes: {first_line(error)}; restore the config.json that was "
            f"written with the weights"
        ) from error
    if wide := model._get_dtype_plan(dtype):  # some tensors stay float32 whatever the rest, such as selection biases
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search("|".join(key.replace("*", ".*") for key in wide), name):
                tensor.data = tensor.data.float()
    if layers:
        place_containers(model, layers)
    return model


def _locum_layers(config: PreTrainedConfig) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return {}
    data = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if data.get("quant_method") != "locum":
        declared_formats(data)
        return {}
    return LocumConfig.from_dict(data).layers


def is_compressed(config: PreTrainedConfig) -> bool:
    return bool(_locum_layers(config))


@dataclass(frozen=True)
class Source:
    """What a checkpoint is loaded from: its config, with the dtype and the ties that its files have, the headers of those
    files, its model without weights, and the MoE layers of that.

    Of a quantised checkpoint, all that is seen as if it were not (packed.py): config and model are those of numbers.
    """

    config: PreTrainedConfig
    files: dict[Path, dict[str, Any]]
    model: PreTrainedModel
    layers: tuple[MoeLayer, ...]
    stored: dict[Path, dict[str, dict[str, Any]]]  # the headers as they are
    packed: dict[str, Packed]
    quantization: dict[str, Any]  # what config.json says of the packed weights

    @functools.cached_property
    def headers(self) -> dict[str, dict[str, Any]]:
        return {name: entry for header in self.files.values() for name, entry in header.items()}

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Where the tensors of the files go in the model; without those that have no place there."""
        return places_of(self.model, self.headers)

    @functools.cached_property
    def unread(self) -> frozenset[str]:
        """Tensors that transformers leaves out on purpose."""
        return unread_tensors(self.model, self.headers.keys() - self.places.keys())

    @functools.cached_property
    def again(self) -> frozenset[str]:
        """Second copies of tied matrices."""
        ties, found = self.model.all_tied_weights_keys, {place.name for place in self.places.values()}
        return frozenset(name for name, place in self.places.items() if ties.get(place.name) in found)

    @functools.cached_property
    def followers(self) -> Followers:
        """What goes where experts of the last layer go; of a layer with stand-ins nothing can."""
        experts = self.layers[-1].experts
        if not self.unread or (isinstance(experts, StandInExperts) and not experts.layout.only_dense):
            return Followers()
        cuts = find_cuts(self.model, self.layers[-1:], self.headers, self.places)
        return find_followers(cuts[self.layers[-1].shape.name], self.headers, self.unread)


def open_source(path: str | Path) -> Source:
    """Read a folder: config and headers, no weight. Raises before anything of the sizes that it names is built.

    The files of an adapter are its own and those of its base, where that is there.
    """
    path = Path(path)
    config, stored = read_config(path), file_headers(path)
    if is_adapter(path) and ((base := base_of(path)) / "config.json").is_file():
        stored = file_headers(base) | stored
    quantization = _take_quantization(path, config)
    if config.dtype is None:
        config.dtype = torch.bfloat16 if quantization else _dtype_in(next(iter(stored.values()), {}))
    files, packed = stored, {}
    if quantization:
        packed = find_packed(stored, quantization, config.dtype)
        files = seen(stored, packed)
    check_sizes(read_json(path / "config.json"), str(path / "config.json"), list(files.values()))
    model, layers = layers_of(path, config)
    if not packed.keys() & model.all_tied_weights_keys.keys() and _is_untied(
        model, stored
    ):  # transformers sees that too
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        model, layers = layers_of(path, config)
    return Source(config, files, model, layers, stored, packed, quantization)


def _take_quantization(path: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says of the number formats of weights, taken out of it; Locum's own layers stay there."""
    said = getattr(config, "quantization_config", None)
    try:
        if said is None or is_compressed(config):
            return {}
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error
    del config.quantization_config
    return said if isinstance(said, dict) else said.to_dict()


def _dtype_in(header: dict[str, dict[str, Any]]) -> torch.dtype | None:
    """The dtype that transformers takes where a config names none: of the first tensor that a model could be computed in."""
    found = (FLOAT_ENTRIES.get(header[name]["dtype"]) for name in sorted(header))
    return next((dtype for dtype in found if dtype is not None), None)


def _is_untied(model: PreTrainedModel, files: dict[Path, dict[str, dict[str, Any]]]) -> bool:
    """Whether config.json ties matrices of which the files hold two that differ, such as an output head of its own."""
    ties = model.all_tied_weights_keys
    if not ties:
        return False
    where = {name: file for file, header in files.items() for name in header if ".experts." not in name}
    names = {live: name for name, live in live_names(model, where).items()}
    both = [(names[tied], names[source]) for tied, source in ties.items() if tied in names and source in names]
    return len(both) == len(ties) and not any(_equal(where[a], a, where[b], b, model.dtype) for a, b in both)


def _equal(file: Path, name: str, other_file: Path, other_name: str, dtype: torch.dtype) -> bool:
    """Whether two matrices of files are equal in a dtype, read some rows at a time and to the first difference alone."""
    with safe_open(file, "pt") as ours, safe_open(other_file, "pt") as theirs:
        a, b = ours.get_slice(name), theirs.get_slice(other_name)
        if (shape := a.get_shape()) != b.get_shape() or not shape:
            return False
        rows = max(1, COMPARED // max(1, math.prod(shape[1:])))
        steps = (slice(i, i + rows) for i in range(0, shape[0], rows))
        return all(torch.equal(a[step].to(dtype), b[step].to(dtype)) for step in steps)


def read_shape(path: str | Path) -> ModelShape:
    """The shape of a checkpoint from its config and safetensors headers; no weight is read."""
    return shape_in(path, open_source(path))


def shape_in(path: str | Path, source: Source) -> ModelShape:
    """The shape of a checkpoint whose folder was read."""
    model, layers, headers = source.model, source.layers, source.headers
    note_stored(model, source.files)
    if is_adapter(path):  # as large as what base and adapter make together
        return replace(shape_of(model), notes=notes_on(model, layers, frozenset()))
    of_model = {name: entry for name, entry in headers.items() if name not in source.unread | source.again}
    of_experts = {entry["dtype"]: entry for name, entry in of_model.items() if ".experts." in name}  # one of each dtype
    expert_formats = [found for entry in of_experts.values() if (found := format_of({"": entry})) is not None]
    itemsize = max((found.nbytes((1,)) for found in expert_formats), default=expert_itemsize(model, layers[0]))
    shapes, notes = stored_shapes(model, layers), notes_on(model, layers, source.unread)
    parameters, size = _numel(headers, headers.keys() - source.again), _nbytes(headers, headers)
    if others := other_weights(Path(path)):
        notes += (
            f"transformers loads {next(iter(source.files)).name}, and so does Locum; the folder "
            f"holds {others[0]} too, which other engines may read instead: keep one of them",
        )
    if source.packed:
        names = sorted({packed.format.name for packed in source.packed.values()})
        notes += (
            f"{len(source.packed)} weights are stored in {', '.join(names)}; they are read as {str(model.dtype).removeprefix('torch.')}",
        )
        cuts = find_cuts(model, layers, headers, source.places)
        shapes = tuple(replace(x, expert_bytes=_per_expert(cuts[x.name], headers)) for x in shapes)
    return ModelShape(source.config.model_type, shapes, parameters, size, itemsize, notes, _aside(source))


def _per_expert(cuts: LayerCuts, headers: dict[str, dict[str, Any]]) -> int:
    """Bytes that one expert of a layer has in the files."""
    for cut in cuts.experts:
        sizes = {name: _nbytes(headers, [name]) for name in cut.names}
        if odd := next((name for name, size in sizes.items() if size != sizes[cut.names[0]]), None):
            raise UnsupportedModel(
                f"{odd} takes {sizes[odd]:,} bytes, {cut.names[0]} {sizes[cut.names[0]]:,}: experts of one layer in several "
                f"number formats are not supported; quantise them alike"
            )
    return sum(cut.per_expert(headers)[1] for cut in cuts.experts)


def _aside(source: Source) -> Aside:
    headers, followers = source.headers, source.followers
    of_expert = [cut.per_expert(headers) for cut in followers.cuts]
    return Aside(
        parameters=_numel(headers, source.unread),
        bytes=_nbytes(headers, source.unread | source.again),
        expert_numel=sum(numel for numel, _ in of_expert),
        expert_bytes=sum(size for _, size in of_expert),
        left_numel=_numel(headers, followers.left),
        left_bytes=_nbytes(headers, followers.left),
    )


def _numel(headers: dict[str, dict[str, Any]], names: Iterable[str]) -> int:
    return sum(math.prod(headers[name]["shape"]) for name in names)


def _nbytes(headers: dict[str, dict[str, Any]], names: Iterable[str]) -> int:
    return sum(headers[name]["data_offsets"][1] - headers[name]["data_offsets"][0] for name in names)


def check_loadable(path: str | Path, source: Source) -> None:
    """Refuse a folder whose tensors are not those of the model that its config describes. Headers alone are asked.

    Of an adapter, whose tensors lie in two folders, `load_adapter` knows more.
    """
    if not is_adapter(path):
        check_fit(path, source.model, source.headers)


def layers_of(path: str | Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, tuple[MoeLayer, ...]]:
    try:
        check_supported(config.model_type)
        model = skeleton(copy.deepcopy(config))
        return model, find_layers(model)
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error


def layouts_of(path: str | Path) -> dict[str, Layout]:
    """The layouts of a checkpoint's containers by the names of their layers."""
    return {name: read_layout(name, data) for name, data in _locum_layers(read_config(path)).items()}


def expert_parameters_in(path: str | Path, shape: ModelShape) -> int:
    """What a checkpoint stores for its routed experts; in compressed ones, what stands in for them."""
    containers, count = layouts_of(path), 0
    for layer in shape.layers:
        if layer.name in containers:
            shapes = containers[layer.name].tensor_shapes()
            count += sum(math.prod(tensor_shape) for tensor_shape in shapes.values())
        else:
            count += layer.num_experts * layer.parameters()
    return count


def active_parameters_in(path: str | Path, shape: ModelShape) -> int:
    """The most parameters of a checkpoint that one token uses (see containers/layout.py)."""
    containers, count = layouts_of(path), shape.model.parameters - expert_parameters_in(path, shape)
    for layer in shape.layers:
        there = containers.get(layer.name)
        count += there.active_parameters(layer.top_k) if there else layer.top_k * layer.parameters()
    return count


def check_vocabularies(model: Path, against: Path) -> None:
    ours, theirs = (read_config(p).get_text_config().vocab_size for p in (model, against))
    if ours != theirs:
        raise OptionError(
            f"{model} has a vocabulary of {ours} and {against} one of {theirs}; compare a model with the checkpoint it "
            f"was made from"
        )
