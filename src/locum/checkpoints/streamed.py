"""Checkpoints as live models of which one decoder layer has weights at a time.

A layer's tensors are read when it is its turn, by transformers' own conversion, and dropped after it; its experts one after
the other, so that nothing but the layer itself takes memory. What is large and not a decoder layer (embeddings, the output head)
has weights while it is called (on_call.py); the rest (norms, small towers) is loaded at once and stays. Results are those of the
whole model, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..containers.container import StandInExperts
from ..errors import CheckpointError, UnsupportedModel
from ..models.decoder_layers import decoder_stack, place_in
from ..models.layer_major import NOTE
from ..models.stored import note_stored
from ..models.watch import configs_of
from .cuts import find_cuts
from .expert_reader import ExpertReader, one_expert_model
from .load import set_dtype
from .on_call import OnCall
from .read import data_start, first_line
from .shard_reader import ShardReader
from .skeleton import Source, check_loadable, open_source
from .tensors import open_tensors
from .weight_files import is_adapter


def stream_model(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A checkpoint as a live model in eval mode whose decoder layers get their weights one at a time (models/layer_major.py), in
    this dtype or that of the checkpoint.

    Raises as `load_model`, and UnsupportedModel for an adapter and for a model whose layers are in no one stack.
    """
    path = Path(path)
    source = open_source(path, dtype)
    if is_adapter(path):
        raise UnsupportedModel(
            f"{path} is an adapter, which is not streamed: give --no-stream, or merge it into its base"
        )
    check_loadable(path, source)
    model = source.model
    if dtype is None:
        note_stored(model, source.files)
    else:
        model.config.dtype = dtype
        set_dtype(model, dtype)
    layers = LayersOfFiles(path, source, device)
    setattr(model, NOTE, layers)
    return model.eval()


class LayersOfFiles:
    """The stack of decoder layers of a model without weights, and where the files hold those of each."""

    def __init__(self, path: Path, source: Source, device: str) -> None:
        self.path, self.model, self.device = path, source.model, device
        self.source = source
        self.name, self.modules = _stack_of(source)
        self._changes: dict[int, Callable[[], None]] = {}
        self._unchanged: dict[int, dict[str, nn.Module]] = {}
        self.names: dict[int | None, list[str]] = {None: [], **{i: [] for i in range(len(self.modules))}}
        for name, place in source.places.items():
            self.names[self._layer_of(place.name)].append(name)
        self.experts = self._find_experts()
        outside = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        outside = [name for name in outside if self._layer_of(name) is None]
        self.on_call = OnCall(self.model, set(outside), device, self._load_parameters)
        waiting = self.on_call.names
        self._load(name for name in self.names[None] if source.places[name].name not in waiting)
        with _one_line(path):
            # Buffers that no file holds, such as rotary frequencies; then what is tied to what was read.
            self.model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
            self.model.tie_weights()
            self.model._initialize_missing_keys(False)
        self.on_call.drop()
        self._check_filled((n, self.model.get_parameter(n)) for n in outside)

    def _layer_of(self, live_name: str) -> int | None:
        """The layer that a tensor of the model belongs to; None for what is outside of the stack."""
        return place_in(self.name, live_name) if live_name.startswith(f"{self.name}.") else None

    @property
    def first_with_experts(self) -> int:
        return place_in(self.name, self.source.layers[0].shape.name)

    def bring(self, index: int) -> None:
        self.on_call.drop()
        experts = {name: reader for name, reader in self.experts.items() if self._layer_of(name) == index}
        apart = {name for reader in experts.values() for name in reader.names}
        self._load(name for name in self.names[index] if name not in apart)
        for name, reader in experts.items():
            self._fill(self.model.get_submodule(name), reader)
        self._check_filled(self.modules[index].named_parameters())
        self._announce(index + 1)
        if index in self._changes:
            self._changes[index]()

    def change(self, index: int, change: Callable[[], None]) -> None:
        """Have a layer changed whenever it is brought, until another change takes the place of this one. It must not be there."""
        self._changes[index] = change
        if index not in self._unchanged:
            shared = {id(config): config for config in configs_of(self.model)}
            self._unchanged[index] = copy.deepcopy(self.modules[index]._modules, shared)

    def drop(self, index: int) -> None:
        if index in self._changes:  # what is read next are the files' own shapes
            shared = {id(config): config for config in configs_of(self.model)}
            self.modules[index]._modules = copy.deepcopy(self._unchanged[index], shared)
        for module in self.modules[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        give_back()

    def _load_parameters(self, names: Iterable[str]) -> None:
        wanted = set(names)
        self._load(name for name in self.names[None] if self.source.places[name].name in wanted)

    def _load(self, names: Iterable[str]) -> None:
        """Read these tensors of the files, which are open for as long as that takes."""
        model, dtype = self.model, self.model.dtype
        with contextlib.ExitStack() as stack, _one_line(self.path):
            slices = open_tensors(self.source, names, stack)
            how = LoadStateDictConfig(
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
                device_map={"": self.device},
                weight_mapping=get_model_conversion_mapping(model),
            )
            with _quiet():
                convert_and_load_state_dict_in_model(model, slices, how, None)

    def _find_experts(self) -> dict[str, ExpertReader]:
        """A reader for every stock layer whose experts have tensors of their own in the files, by the name of its experts module.

        Other layers are converted at once: files that have experts side by side, as memory has them, need no room for
        joining them, and how those lie in the file changes last bits of products.
        """
        source, model = self.source, self.model
        stock = [layer for layer in source.layers if not isinstance(layer.experts, StandInExperts)]
        try:
            cuts = find_cuts(model, stock, source.headers, source.places)
        except UnsupportedModel:
            return {}
        files, one = ShardReader(source.stored, source.packed), one_expert_model(source.config)
        numbered = [x for x in stock if all(cut.axis is None for cut in cuts[x.shape.name].experts)]
        return {x.shape.name: ExpertReader(x, cuts[x.shape.name], source.places, files, one) for x in numbered}

    def _fill(self, experts: nn.Module, reader: ExpertReader) -> None:
        """Read a layer's experts one after the other: nothing but the layer itself takes memory."""
        own = experts._parameters
        with torch.inference_mode(False), torch.no_grad():
            for e in range(experts.num_experts):
                for leaf, tensor in reader.tensors(e).items():
                    if own[leaf].device.type == "meta":
                        room = torch.empty_like(own[leaf], device=self.device)
                        own[leaf] = nn.Parameter(room, requires_grad=False)
                    own[leaf][e].copy_(tensor)

    def _announce(self, index: int) -> None:
        """Tell the system what is read next, so that the disk works while a layer is computed."""
        if not hasattr(os, "posix_fadvise"):
            return
        packed, names = self.source.packed, self.names.get(index, [])
        stored = {part for name in names for part in (packed[name].parts.values() if name in packed else (name,))}
        for file, header in self.source.stored.items():
            if not (here := stored & header.keys()):
                continue
            start = data_start(file)
            with file.open("rb") as stream:
                for begin, end in (header[name]["data_offsets"] for name in here):
                    os.posix_fadvise(stream.fileno(), start + begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _check_filled(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if empty := [name for name, tensor in parameters if tensor.device.type == "meta"]:
            raise CheckpointError(
                f"{self.path}: {len(empty)} tensors are missing (first: {min(empty)}); fetch it again"
            )


def _stack_of(source: Source) -> tuple[str, Sequence[nn.Module]]:
    try:
        prefix, stack = decoder_stack(source.model, (layer.shape.name for layer in source.layers))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{source.config.model_type!r} cannot be streamed: {error}") from error
    return prefix, list(stack)


def give_back() -> None:
    """Let the system have what was freed. glibc keeps pages that small tensors have left among others: 0.1 GB a layer of a
    large model, until it is asked. Other libraries have no such call."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar, of which there would be one a layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever transformers raises while it reads is one line about the folder."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be loaded by transformers: {type(error).__name__}: {first_line(error)}"
        ) from error
