"""The model of a checkpoint without its weights, and the sizes that follow from it.

`open_source` is the one reading of a folder: which files, which tensors, which dtype. Sizes and loading both go by it.
"""

from __future__ import annotations

import copy
import functools
import math
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
from ..experts.parts.own_weights import OwnWeights
from ..formats.format import declared_formats, format_of
from ..formats.plain import FLOAT_ENTRIES
from ..models.families import MoeLayer, check_supported, find_layers, notes_on, unread_tensors
from ..models.sizes import expert_itemsize, packed_away, shape_of, stored_shapes, vocab_size
from ..models.stored import Place, live_names, note_stored, places_of
from ..plans.numbering import Numbering
from ..shapes import Aside, LayerShape, ModelShape
from .cuts import LayerCuts, find_cuts
from .empty_model import is_compressed, locum_layers, skeleton
from .fit import check_fit, check_sizes
from .inside import read_json
from .own_rows import OwnRows, see
from .packed import Packed, Seen
from .placing import REST, LocumConfig, read_layout
from .prediction import Followers, find_followers
from .read import base_of, file_headers, read_config
from .weight_files import is_adapter, other_weights

COMPARED = 2**22  # numbers of two matrices that are in memory at a time


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
    packed: dict[str, Seen]
    quantization: dict[str, Any]  # what config.json says of the packed weights

    @property
    def numbers(self) -> str:
        """What packed weights are read as."""
        return str(self.model.dtype).removeprefix("torch.")

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
    def own(self) -> dict[str, OwnRows]:
        """Of containers with nothing but experts that a quantised checkpoint has in the family's tensors, one of their own."""
        found = {}
        for layer in self.layers:
            row = self.packed.get(f"{layer.shape.name}.{OwnWeights.prefix}down_NDF")
            if isinstance(row, OwnRows) and layer.experts.layout.only_dense:
                found[layer.shape.name] = row
        return found

    @functools.cached_property
    def followers(self) -> Followers:
        """What goes where experts of the last layer go; of a layer with stand-ins nothing can."""
        experts = self.layers[-1].experts
        if not self.unread or (isinstance(experts, StandInExperts) and not experts.layout.only_dense):
            return Followers()
        cuts = find_cuts(self.model, self.layers[-1:], self.headers, self.places)
        return find_followers(cuts[self.layers[-1].shape.name], self.headers, self.unread)


def open_source(path: str | Path, dtype: torch.dtype | None = None) -> Source:
    """Read a folder: config and headers, no weight. Raises before anything of the sizes that it names is built.

    The files of an adapter are its own and those of its base, where that is there. Quantised weights are seen in `dtype`, or in
    that of the config.
    """
    path = Path(path)
    config, stored = read_config(path), file_headers(path)
    if is_adapter(path) and ((base := base_of(path)) / "config.json").is_file():
        stored = file_headers(base) | stored
    quantization = _take_quantization(path, config)
    if config.dtype is None:
        config.dtype = torch.bfloat16 if quantization else _dtype_in(next(iter(stored.values()), {}))
    try:
        files, packed = see(stored, quantization, config, dtype or config.dtype) if quantization else (stored, {})
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error
    check_sizes(read_json(path / "config.json"), str(path / "config.json"), list(files.values()))
    model, layers = layers_of(path, config)
    tied_is_packed = bool(packed.keys() & model.all_tied_weights_keys.keys())
    if not tied_is_packed and _is_untied(model, stored):  # transformers sees that too as it loads, and keeps both
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        model, layers = layers_of(path, config)
    return Source(config, files, model, layers, stored, packed, quantization)


def _take_quantization(path: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says of the number formats of weights, taken out of it; Locum's own layers stay there."""
    holder = config if hasattr(config, "quantization_config") else config.get_text_config(decoder=True)
    said = getattr(holder, "quantization_config", None)
    if said is None:
        return {}
    said = said if isinstance(said, dict) else said.to_dict()
    try:
        if not is_compressed(config):
            declared_formats(said)
            del holder.quantization_config
            return said
        rest = LocumConfig.from_dict(said).rest
        if rest is not None:
            declared_formats(rest)
            config.quantization_config = {name: value for name, value in said.items() if name != REST}
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error
    return rest or {}


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
    of_experts = {
        e["dtype"]: e for n, e in of_model.items() if ".experts." in n and e["dtype"] in FLOAT_ENTRIES
    }  # one of each
    expert_formats = [found for entry in of_experts.values() if (found := format_of({"": entry})) is not None]
    itemsize = max((found.nbytes((1,)) for found in expert_formats), default=expert_itemsize(model, layers[0]))
    shapes, notes = stored_shapes(model, layers), notes_on(model, layers, source.unread)
    parameters, size = _numel(headers, headers.keys() - source.again), _nbytes(headers, headers)
    parameters += sum(packed_away(layer.experts) for layer in layers)
    if others := other_weights(Path(path)):
        notes += (
            f"transformers loads {next(iter(source.files)).name}, and so does Locum; the folder "
            f"holds {others[0]} too, which other engines may read instead: keep one of them",
        )
    if source.packed:
        formats = [one.format.name for one in source.packed.values() if isinstance(one, Packed)]
        names = ", ".join(sorted({*formats}))
        notes += (f"{len(formats)} weights are stored in {names}; they are read as {source.numbers}",)
        stock = [layer for layer in layers if not isinstance(layer.experts, StandInExperts)]
        cuts = find_cuts(model, stock, headers, source.places)
        sizes = {name: _per_expert(cut, headers) for name, cut in cuts.items()}
        sizes |= {name: _per_expert(own.cuts, own.headers) for name, own in source.own.items()}
        shapes = tuple(replace(x, expert_bytes=sizes.get(x.name, 0)) for x in shapes)
    shapes = tuple(_with_unread_around(layer, source) for layer in shapes) if source.unread else shapes
    aside, tokens = _aside(source), vocab_size(model)
    return ModelShape(source.config.model_type, shapes, parameters, size, itemsize, notes, aside, tokens)


def _with_unread_around(layer: LayerShape, source: Source) -> LayerShape:
    """The shape with what lies in the layer's decoder layer and transformers does not load, which goes with it."""
    named = Numbering.without([layer.name])
    inside = [name for name in source.unread if named.name_after(name) is None]
    if not layer.around_numel or not inside:
        return layer
    numel, size = _numel(source.headers, inside), _nbytes(source.headers, inside)
    return replace(layer, around_numel=layer.around_numel + numel, around_bytes=layer.around_bytes + size)


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
    return {name: read_layout(name, data) for name, data in locum_layers(read_config(path)).items()}


def expert_parameters_in(path: str | Path, shape: ModelShape) -> int:
    """What a checkpoint stores for its routed experts; in compressed ones, what stands in for them."""
    containers, count = layouts_of(path), 0
    for layer in shape.layers:
        if layer.name in containers:
            count += containers[layer.name].parameters()
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


def active_bytes_in(path: str | Path, shape: ModelShape, source: Source) -> int:
    """The bytes of the same. Where a layer has several number formats, a parameter counts as the mean of them."""
    containers = layouts_of(path)
    if not source.packed and not any(layout.formats for layout in containers.values()):
        idle = shape.model.parameters - active_parameters_in(path, shape)
        return shape.model.bytes - idle * shape.expert_itemsize
    size, held = shape.model.bytes, dict.fromkeys((x.name for x in shape.layers), 0)
    for name, place in source.places.items():
        layer = place.name.rpartition(".experts.")[0] + ".experts"
        held[layer] = held.get(layer, 0) + _nbytes(source.headers, [name])
    for layer in shape.layers:
        there, one = containers.get(layer.name), layer.parameters()
        stored = there.parameters() if there else layer.num_experts * one
        active = there.active_parameters(layer.top_k) if there else layer.top_k * one
        size -= round(held[layer.name] * max(0, stored - active) / max(1, stored))
    return size


def check_vocabularies(model: Path, against: Path) -> None:
    ours, theirs = (read_config(p).get_text_config().vocab_size for p in (model, against))
    if ours != theirs:
        raise OptionError(
            f"{model} has a vocabulary of {ours} and {against} one of {theirs}; compare a model with the checkpoint it "
            f"was made from"
        )
