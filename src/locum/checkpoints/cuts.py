"""Which tensors of a checkpoint's files have something for every expert of a layer, and where they can be cut.

Files number the experts and give each tensors of its own, or have them side by side along an axis of one tensor. A router has
rows. So keeping some experts is keeping some tensors, or some ranges of a tensor's bytes: no number is read or changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..containers.container import StandInExperts
from ..errors import CheckpointError, UnsupportedModel
from ..models.families import EXPERT_TENSORS, MoeLayer
from ..models.stored import ONE_EXPERT, Place

Headers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cut:
    """One tensor that all experts of a layer share, or as many as there are experts."""

    names: tuple[str, ...]  # in the files: of the one tensor, or of each expert's own
    axis: int | None = None  # of the one tensor, along which the experts lie

    def name_of(self, e: int) -> str:
        """The tensor that has what expert `e` has."""
        return self.names[e] if self.axis is None else self.names[0]

    def per_expert(self, headers: Headers) -> tuple[int, int]:
        """Numbers and bytes that one expert has of it."""
        entry = headers[self.names[0]]
        begin, end = entry["data_offsets"]
        count = 1 if self.axis is None else entry["shape"][self.axis]
        return math.prod(entry["shape"]) // count, (end - begin) // count


@dataclass(frozen=True)
class LayerCuts:
    """Those of one layer."""

    experts: tuple[Cut, ...]
    router: tuple[Cut, ...]

    @property
    def names(self) -> Iterator[str]:
        return itertools.chain.from_iterable(cut.names for cut in (*self.experts, *self.router))


def find_cuts(
    model: PreTrainedModel, layers: Sequence[MoeLayer], headers: Headers, places: Mapping[str, Place]
) -> dict[str, LayerCuts]:
    """The cuts of every layer of a model without weights, by the layer's name. Headers alone are asked.

    Every expert must be there whole, in a stock layer or in a container.
    """
    in_files: dict[str, list[str]] = {}
    for name, place in places.items():
        in_files.setdefault(place.name, []).append(name)
    live = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    found = {}
    for layer in layers:
        named = [name for leaf in _leaves(layer) for name in in_files.get(f"{layer.shape.name}.{leaf}", [])]
        router = []
        for part in layer.per_expert:
            names = in_files.get(live[id(part.tensor)], [])
            if any(places[name].converted for name in names):
                raise UnsupportedModel(f"{names[0]}: this router's tensors are stored in another form than they have")
            router += [Cut((name,), part.axis) for name in names]
        found[layer.shape.name] = LayerCuts(tuple(cuts_of(named, headers, layer.shape.num_experts)), tuple(router))
    return found


def _leaves(layer: MoeLayer) -> tuple[str, ...]:
    experts = layer.experts
    return tuple(experts.layout.tensor_shapes()) if isinstance(experts, StandInExperts) else EXPERT_TENSORS


def cuts_of(names: Iterable[str], headers: Headers, num_experts: int) -> Iterator[Cut]:
    """The cuts of one layer's experts, from the names of all their tensors."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(ONE_EXPERT.sub("*", name), []).append(name)
    for pattern, found in alike.items():
        if pattern == found[0]:
            if (shape := headers[pattern]["shape"])[:1] != [num_experts]:
                raise UnsupportedModel(
                    f"{pattern} has shape {shape} in the files; expected its {num_experts} experts on the first axis: Locum "
                    f"does not know how these files keep experts"
                )
            yield Cut((pattern,), 0)
            continue
        numbered = tuple(ONE_EXPERT.sub(str(e), found[0]) for e in range(num_experts))
        if wrong := sorted(set(numbered) ^ set(found)):
            what = "are missing" if wrong[0] in numbered else "are more than config.json has experts"
            raise CheckpointError(f"{len(wrong)} tensors {what} (first: {wrong[0]}); fetch the files again")
        if odd := next((n for n in numbered if headers[n]["shape"] != headers[numbered[0]]["shape"]), None):
            raise CheckpointError(
                f"{odd} has shape {headers[odd]['shape']}, {numbered[0]} {headers[numbered[0]]['shape']}; fetch the files again"
            )
        yield Cut(numbered)


def kept_ranges(entry: Mapping[str, Any], axis: int, keep: Sequence[int], num_experts: int) -> list[tuple[int, int]]:
    """The bytes of a tensor that are left where these experts are kept, and what lies behind the experts' (routers)."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    items = [*keep, *range(num_experts, shape[axis])]
    one = (end - begin) // max(1, math.prod(shape[: axis + 1]))
    ranges: list[tuple[int, int]] = []
    for outer, item in itertools.product(range(math.prod(shape[:axis])), items):
        first = (outer * shape[axis] + item) * one
        if ranges and ranges[-1][1] == first:
            ranges[-1] = ranges[-1][0], first + one
        else:
            ranges.append((first, first + one))
    return ranges
