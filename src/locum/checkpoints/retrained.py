"""A checkpoint's weight files with other numbers in some tensors: the rest is copied byte for byte, and no model is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..containers.container import StandInExperts
from ..errors import CheckpointError, UnsupportedModel
from ..formats.plain import STORED
from ..models.conversions import as_in_files, note_conversions, save_as_stock
from .rewrite import SHARD
from .shard_reader import ShardReader
from .shard_writer import Entry, ShardWriter
from .skeleton import Source


def check_rewritable(path: Path, source: Source) -> None:
    """Refuse a checkpoint whose packed weights would have to be packed again."""
    if source.packed:
        raise UnsupportedModel(f"{path} is quantised, and what is trained of it is not packed again: give --no-stream")


def write_retrained(folder: Path, source: Source, changed: Iterable[Mapping[str, Tensor]]) -> None:
    """Write config and weights into a folder. `changed` are tensors by their names in the live model, in any order but those that
    files hold as one together; they are written in the dtypes that the files have.

    Raises CheckpointError for a tensor that the files do not have so.
    """
    note_conversions(source.model, source.headers)
    if any(isinstance(layer.experts, StandInExperts) for layer in source.layers):
        save_as_stock(source.model)
    reader = ShardReader(source.stored)
    entries = {name: Entry.of(entry) for name, entry in reader.entries.items()}
    writer, written = ShardWriter(folder, entries, SHARD), set()
    for tensors in changed:
        for name, tensor in as_in_files(source.model, tensors).items():
            if name not in entries or tuple(tensor.shape) != entries[name].shape:
                raise CheckpointError(f"{name} of shape {list(tensor.shape)} is not in the files that were trained")
            ready = tensor.detach().to(STORED[entries[name].dtype]).contiguous().reshape(-1)
            writer.write(name, [memoryview(ready.view(torch.uint8).numpy())])
            written.add(name)
    for name, entry in entries.items():
        if name not in written:
            writer.write(name, reader.pieces(name, [(0, entry.nbytes)]))
    writer.finish()
    source.model.config.save_pretrained(folder)
