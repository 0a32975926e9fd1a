"""The experts of a checkpoint folder, read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..experts.weights import ExpertWeights
from .convert import check_openable
from .cuts import find_cuts
from .expert_reader import ExpertReader, one_expert_model
from .shard_reader import ShardReader
from .skeleton import check_loadable, open_source


def expert_readers(path: str | Path) -> Callable[[str], Callable[[int], ExpertWeights]]:
    """Readers of the experts of a stock or pruned checkpoint, by the name of their layer. Weights are read when asked for.

    Raises as `open_model`, before.
    """
    check_openable(path, "give the original checkpoint")
    source = open_source(path)
    check_loadable(path, source)
    files, one = ShardReader(source.stored, source.packed), one_expert_model(source.model.config)
    cuts = find_cuts(source.model, source.layers, source.headers, source.places)
    readers = {x.shape.name: ExpertReader(x, cuts[x.shape.name], source.places, files, one) for x in source.layers}
    return readers.__getitem__
