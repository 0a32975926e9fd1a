"""Own weights of containers' experts, which a quantised checkpoint keeps in the family's tensors and in their number format.

In the files such experts are numbered by their row in the container, from 0 on; the rows of bases, which come after, lie in
tensors of their own (BASES). Seen are the container's tensors, whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..containers.layout import Layout
from ..errors import CheckpointError
from ..experts.parts.own_weights import OwnWeights, rows_of
from ..formats.plain import ENTRIES, FLOAT_ENTRIES
from ..models.families import EXPERT_TENSORS, MoeLayer, find_layers
from ..models.stored import Place, places_of
from .cuts import LayerCuts, cuts_of
from .empty_model import locum_layers, skeleton
from .expert_reader import ExpertReader, one_expert_model
from .packed import Files, Seen, Stored, find_packed, seen
from .placing import by_place, read_layout
from .shard_reader import ShardReader

BASES = "bases."  # instead of the prefix of own weights, among which bases lie in a container


@dataclass(frozen=True)
class OwnRows:
    """One tensor of a container's own weights and bases."""

    leaf: str
    experts: ExpertReader
    cuts: LayerCuts  # of the experts' tensors in the files
    headers: Mapping[str, Mapping[str, Any]]  # of these tensors, seen as numbers
    packed: Mapping[str, Seen]  # those of them that are packed
    own: int  # rows that are experts
    bases: str  # the name of the tensor that has the others, if there are any
    parts: Mapping[str, str]
    entry: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return FLOAT_ENTRIES[self.entry["dtype"]]

    def read(self, files: Stored) -> Tensor:
        return torch.stack([self.read_row(files, index) for index in range(self.entry["shape"][0])])

    def read_row(self, files: Stored, index: int) -> Tensor:
        if index < self.own:
            return rows_of(self.experts(index))[self.leaf].to(self.dtype)
        return files.item(self.bases, index - self.own)[0]


def see(
    stored: Files, rest: Mapping[str, Any], config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[dict[Path, dict[str, Any]], dict[str, Seen]]:
    """The headers of a quantised checkpoint's files as if they were not, and all that is seen in place of what is there.

    `rest` is what config.json says of number formats; `dtype` is that of the numbers.
    """
    packed: dict[str, Seen] = dict(find_packed(stored, rest, dtype))
    files = seen(stored, packed)
    if not (containers := locum_layers(config)):
        return files, packed
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stock, one = skeleton(config), one_expert_model(config)
    headers = {name: entry for header in files.values() for name, entry in header.items()}
    places, reader = places_of(stock, headers), ShardReader(stored, packed)
    layers = {layer.shape.name: layer for layer in find_layers(stock)}
    for said, data in containers.items():
        name, layout = by_place(said, layers), read_layout(said, data)
        mine = [
            n for n, place in places.items() if place.name.rpartition(".")[::2] in {(name, x) for x in EXPERT_TENSORS}
        ]
        if not mine:
            continue
        made = _rows_of_layer(said, layers[name], layout, mine, headers, places, reader, packed, one, dtype)
        gone = {*mine, *(row.bases for row in made.values())}
        files = {file: {n: e for n, e in header.items() if n not in gone} for file, header in files.items()}
        next(iter(files.values())).update({n: row.entry for n, row in made.items()})
        packed = {n: one_ for n, one_ in packed.items() if n not in gone} | made
    return files, packed


def _rows_of_layer(
    said: str,
    layer: MoeLayer,
    layout: Layout,
    mine: list[str],
    headers: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, Place],
    reader: ShardReader,
    packed: Mapping[str, Seen],
    one: Any,
    dtype: torch.dtype,
) -> dict[str, OwnRows]:
    name, leaves = layer.shape.name, OwnWeights.tensors((), layout)
    bases = {leaf: f"{said}.{BASES}{leaf}" for leaf in leaves}
    first = headers.get(bases[next(iter(leaves))])
    own = layout.num_dense - (first["shape"][0] if first else 0)
    cuts = LayerCuts(tuple(cuts_of(mine, headers, own)), ())
    experts, made = ExpertReader(layer, cuts, places, reader, one), {}
    items = {n: packed[n] for n in mine if n in packed}
    size = sum(_nbytes(headers[n]) for n in mine)
    for leaf, row in leaves.items():
        of_bases = headers.get(bases[leaf])
        rows = layout.num_dense - own
        if (of_bases["shape"] if of_bases else [0]) != ([rows, *row] if rows else [0]):
            raise CheckpointError(
                f"{bases[leaf]} is not there with the {rows} rows that config.json lays out; fetch the files again"
            )
        parts = {n: n for m in mine for n in reader.parts(m)} | ({"": bases[leaf]} if of_bases else {})
        size += _nbytes(of_bases) if of_bases else 0
        entry = {"dtype": ENTRIES[dtype], "shape": [layout.num_dense, *row], "data_offsets": [0, size]}
        made[f"{name}.{OwnWeights.prefix}{leaf}"] = OwnRows(
            leaf,
            experts,
            cuts,
            {n: headers[n] for n in mine},
            items,
            own,
            bases[leaf] if of_bases else "",
            parts,
            entry,
        )
        size = 0  # the experts' bytes are counted once, with the first
    return made


def _nbytes(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin
