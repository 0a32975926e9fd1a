"""The experts of a checkpoint folder, read one at a time, and the weights of whole layers.

Letters: E experts, I width of what a router reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ..errors import UnsupportedModel
from ..experts.weights import ExpertWeights
from ..models.families import MoeLayer
from ..stats.events import WeightsEvent
from .convert import check_openable
from .cuts import find_cuts
from .expert_reader import ExpertReader, one_expert_model
from .shard_reader import ShardReader
from .skeleton import Source, check_loadable, open_source


def expert_readers(path: str | Path) -> Callable[[str], Callable[[int], ExpertWeights]]:
    """Readers of the experts of a stock or pruned checkpoint, by the name of their layer. Weights are read when asked for.

    Raises as `open_model`, before.
    """
    return _readers(_opened(path)).__getitem__


def weights_events(path: str | Path) -> Iterator[tuple[str, WeightsEvent]]:
    """The weights of a stock or pruned checkpoint, layer by layer. Raises as `expert_readers`."""
    source = _opened(path)
    readers = _readers(source)
    for layer in source.layers:
        name, count = layer.shape.name, layer.shape.num_experts
        yield name, WeightsEvent(tuple(readers[name](e).matrices for e in range(count)), _router(source, layer))


def _router(source: Source, layer: MoeLayer) -> Tensor:
    """[E, I] the router's matrix."""
    live = {id(tensor): name for name, tensor in source.model.state_dict(keep_vars=True).items()}
    files = {place.name: name for name, place in source.places.items() if place.converter is None}
    for part in layer.per_expert:
        if part.tensor.ndim == 2 and (file := files.get(live.get(id(part.tensor), ""))) is not None:
            found = ShardReader(source.stored, source.packed).tensor(file).movedim(part.axis, 0)
            return found[: layer.shape.num_experts]
    raise UnsupportedModel(f"router {layer.shape.router} has no matrix in the files with a row for each expert")


def _opened(path: str | Path) -> Source:
    check_openable(path, "give the original checkpoint")
    source = open_source(path)
    check_loadable(path, source)
    return source


def _readers(source: Source) -> dict[str, ExpertReader]:
    files, one = ShardReader(source.stored, source.packed), one_expert_model(source.model.config)
    cuts = find_cuts(source.model, source.layers, source.headers, source.places)
    return {x.shape.name: ExpertReader(x, cuts[x.shape.name], source.places, files, one) for x in source.layers}
