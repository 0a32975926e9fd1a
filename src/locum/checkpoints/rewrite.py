"""Carrying out a plan on files: every tensor of a checkpoint is copied, cut, left out, or made anew, and no model is built.

What a plan does not touch keeps its bytes, its dtype and its name, whether transformers loads it or not. Experts and routers
of a layer that loses some are cut where they lie (cuts.py). A layer that needs a container gets its tensors a row at a time,
from one expert at a time (expert_reader.py). So memory holds one expert, what is made of it, and the bases of a layer.

Steps and their order follow from plan and headers alone, and so do all sizes. So several ranks (ranks.py) can share the steps:
the first one lays the files out, and each writes the bytes of its own steps to their places.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import dot_natural_key

from .. import ranks
from ..containers.build import Read, build_rows, rewritten
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..errors import UnsupportedModel
from ..experts.parts.own_weights import OwnWeights
from ..files import check_room
from ..formats.format import part_name
from ..formats.plain import ENTRIES
from ..models.conversions import names_in_files, note_conversions, save_as_stock
from ..models.families import (
    EXPERT_COUNTS,
    MoeLayer,
    canonical_activation,
    leave_router_logits,
    places_of_top_k,
    set_expert_count,
)
from ..plans.numbering import Numbering
from ..plans.plan import KEPT, LayerPlan, Plan
from ..runs import bytes_begun
from ..shapes import ModelShape
from ..stats.sums import LayerStatistics, Statistics
from .cuts import Cut, find_cuts, kept_ranges
from .expert_reader import ExpertReader, ExpertSplitter, one_expert_model
from .fewer_layers import prefix_in_files, without_layers
from .own_rows import BASES
from .placing import LocumConfig
from .shard_reader import Ranges, ShardReader
from .shard_writer import Entry, ShardWriter
from .skeleton import Source

ONE_EXPERT_OF = re.compile(r"(.*\.experts\.)(\d+)(|\..*)$")  # a name by what comes before an expert's number, and after
SHARD = 5 * 2**30  # bytes of a weight file, at most
SAVE = 2**30  # bytes after which what is written is saved for the case that the run is interrupted
PER_TENSOR, AROUND = 256, 2**20  # bytes of a header's entry, and of what is written anew: plan, card, notes


@dataclass(frozen=True)
class Step:
    """Some tensors that are written one after the other, and how."""

    entries: dict[str, Entry]
    fill: Callable[[ShardWriter], None]
    layer: str = ""  # where they are the experts of a layer: its name

    @property
    def bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


class Rewriting:
    """What a plan makes of a checkpoint: its config, the steps to its files, and their size. Made without reading a weight.

    Raises CheckpointError and UnsupportedModel for files whose experts cannot be read one by one.
    """

    def __init__(
        self, source: Source, shape: ModelShape, plan: Plan, statistics: Statistics | None = None, seed: int = 0
    ) -> None:
        self._source, self._plan, self._statistics, self._seed = source, plan, statistics, seed
        self._stock = plan.is_stock(shape)
        self._packed = {name: one for own in source.own.values() for name, one in own.packed.items()} | source.packed
        self._files = ShardReader(source.stored, self._packed)
        self._one = one_expert_model(source.model.config)
        note_conversions(self._one, source.headers)
        if any(isinstance(layer.experts, StandInExperts) for layer in source.layers):
            save_as_stock(self._one)
        self._cuts = find_cuts(source.model, source.layers, source.headers, source.places)
        self._layouts: dict[str, Layout] = {}
        self._numbering = plan.numbering
        if self._numbering.gone:
            self._numbering = replace(plan.numbering, prefix=prefix_in_files(source.model, source.places))
        self.steps = self._all_steps(bool(plan.leaves_aside(shape)))
        self.config = self._settled_config()

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def read_bytes(self) -> int:
        """Of weights, so far."""
        return self._files.read_bytes

    def needed_space(self, side_files: Iterable[Path] = ()) -> int:
        """Bytes on the disk that it takes, with the files that go along."""
        entries = sum(len(step.entries) for step in self.steps)
        return self.bytes + PER_TENSOR * entries + AROUND + sum(file.stat().st_size for file in side_files)

    def check_space(self, out: Path, side_files: Iterable[Path] = ()) -> None:
        """Refuse a disk that is too small for it, before anything is written."""
        check_room(out, self.needed_space(side_files), bytes_begun(out))

    def write(
        self,
        folder: Path,
        limit: int = SHARD,
        progress: Callable[[str], None] = lambda layer: None,
        done: int = 0,
        save: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Write config and weights into a folder. `progress` is told the name of each of the plan's layers that is done.

        `save(number)` is called when so many steps are done: after every layer's experts (every N-th of N ranks, which then
        had one each), and SAVE bytes of each rank at the latest. The same rewriting goes on from there in the same folder,
        given that number as `done`, by any number of ranks. The first rank may go on when all have written theirs.
        """
        if ranks.is_first():
            self.config.save_pretrained(folder)
        mine = self._share()
        written = [step for number, step in enumerate(self.steps) if number < done or number not in mine]
        writer = self._writer(folder, limit, written, done > 0)
        unsaved = layers = 0
        for number, step in enumerate(self.steps):
            if number >= done:
                if number in mine:
                    step.fill(writer)
                unsaved, layers = unsaved + step.bytes, layers + bool(step.layer)
                if layers == ranks.count() or unsaved >= SAVE * ranks.count():
                    save(number + 1)
                    unsaved = layers = 0
            if self._plan.layer(step.layer) is not None:
                progress(step.layer)
        writer.finish()
        ranks.wait()

    def _share(self) -> set[int]:
        """The numbers of the steps that this rank does: every N-th layer, and every N-th of all else."""
        layers = [number for number, step in enumerate(self.steps) if step.layer]
        others = [number for number, step in enumerate(self.steps) if not step.layer]
        return {*ranks.share(layers), *ranks.share(others)}

    def _writer(self, folder: Path, limit: int, written: Iterable[Step], is_begun: bool) -> ShardWriter:
        """The files of a folder, in which some steps are `written` already, or by another rank."""
        entries = {name: entry for step in self.steps for name, entry in step.entries.items()}
        done = {name for step in written for name in step.entries}
        if ranks.is_first():
            writer = ShardWriter(folder, entries, limit, done, is_begun)
        ranks.wait()
        return writer if ranks.is_first() else ShardWriter(folder, entries, limit, done, is_begun=True)

    # --- steps

    def _all_steps(self, follow: bool) -> list[Step]:
        """The steps in the order of the tensors' names. What is cut or made anew takes the place of what it was."""
        instead: dict[str, list[Step]] = {}
        for layer in self._source.layers:
            cuts, plan = self._cuts[layer.shape.name], self._plan_of(layer)
            if plan.dropped:
                _replace(instead, cuts.experts, Step({}, _nothing, plan.layer))
                continue
            keep = plan.survivors
            is_container = isinstance(layer.experts, StandInExperts) or self._becomes_container(layer)
            if self._plan.layer(plan.layer) is not None or is_container:
                _replace(instead, cuts.experts, self._experts_step(layer, plan))
            if len(keep) < layer.shape.num_experts:
                _replace(instead, cuts.router, self._cutting(cuts.router, keep, layer.shape.num_experts))
        if follow:
            last = next(layer for layer in reversed(self._source.layers) if not self._plan_of(layer).dropped)
            followers = self._source.followers
            keep, count = self._plan_of(last).survivors, last.shape.num_experts
            _replace(instead, followers.cuts, self._cutting(followers.cuts, keep, count))
            instead |= {name: [] for name in followers.left}
        steps = []
        for name in sorted(self._source.headers, key=dot_natural_key):
            if name in instead:
                steps += instead[name]
            elif self._numbering.name_after(name) is not None:
                steps.append(self._copying(name))
        return [_numbered(step, self._numbering) for step in steps] if self._numbering.gone else steps

    def _plan_of(self, layer: MoeLayer) -> LayerPlan:
        name, count = layer.shape.name, layer.shape.num_experts
        return self._plan.layer(name) or LayerPlan(name, (KEPT,) * count)

    def _becomes_container(self, layer: MoeLayer) -> bool:
        """Whether the stock layout cannot hold the layer, because of its plan or of its number of experts."""
        plan = self._plan_of(layer)
        return not self._stock and not (plan.is_identity and layer.shape.num_experts in self._counts(layer))

    def _counts(self, layer: MoeLayer) -> list[int | None]:
        """What the config of a layer says of its number of experts."""
        config = self._one.get_submodule(layer.shape.name).config
        return [getattr(config, name, None) for name in EXPERT_COUNTS]

    def _experts_step(self, layer: MoeLayer, plan: LayerPlan) -> Step:
        """The experts of one layer of the plan."""
        cuts, is_container = self._expert_cuts(plan.layer), isinstance(layer.experts, StandInExperts)
        becomes_container, own = self._becomes_container(layer), self._source.own.get(plan.layer)
        if own is not None:
            read = own.experts
        else:
            read = ExpertReader(layer, self._cuts[plan.layer], self._source.places, self._files, self._one)
        if plan.rewritten and not becomes_container:
            become = rewritten(plan, read, self._statistics_of(plan), self._seed_of(plan))
            return self._splitting(layer, plan, become, read.dtype)
        if (not is_container or own is not None) and not becomes_container:
            return self._cutting(cuts, plan.survivors, layer.shape.num_experts, plan.layer)
        if becomes_container:
            self._layouts[plan.layer] = Layout.of(plan, layer.shape)
            if is_container and self._layouts[plan.layer] == layer.experts.layout and not plan.rewritten:
                return self._cutting(cuts, plan.survivors, layer.shape.num_experts, plan.layer)
        return (
            self._building(layer, plan, read) if becomes_container else self._splitting(layer, plan, read, read.dtype)
        )

    def _statistics_of(self, plan: LayerPlan) -> LayerStatistics | None:
        return self._statistics.layer(plan.layer) if self._statistics is not None and plan.needs else None

    def _seed_of(self, plan: LayerPlan) -> int:
        index = next((i for i, each in enumerate(self._plan.layers) if each.layer == plan.layer), 0)
        return self._seed * 1_000_003 + index

    def _expert_cuts(self, layer: str) -> Sequence[Cut]:
        """What the files have of a layer's experts, also where a container is seen instead."""
        own = self._source.own.get(layer)
        return self._cuts[layer].experts if own is None else own.cuts.experts

    def _copying(self, name: str) -> Step:
        """A tensor as it is, with all its parts."""
        entries = {part: Entry.of(self._files.entries[part]) for part in self._parts(name).values()}

        def fill(writer: ShardWriter) -> None:
            for part, entry in entries.items():
                self._copy(writer, part, part, [(0, entry.nbytes)])

        return Step(entries, fill)

    def _parts(self, name: str) -> Mapping[str, str]:
        """The tensors in the files that make one: itself, or those of a packed weight."""
        packed = self._packed.get(name)
        return {"": name} if packed is None else packed.parts

    def _cutting(self, cuts: Sequence[Cut], keep: Sequence[int], num_experts: int, layer: str = "") -> Step:
        """What these experts have, numbered anew."""
        entries: dict[str, Entry] = {}
        taken: list[tuple[str, str, Ranges]] = []
        for cut in cuts:
            if cut.axis is None:
                for new, old in enumerate(keep):
                    for part, name in self._parts(cut.names[old]).items():
                        named = part_name(cut.names[new], part)
                        entry = entries[named] = Entry.of(self._files.entries[name])
                        taken.append((named, name, [(0, entry.nbytes)]))
                continue
            for name in self._parts(cut.names[0]).values():
                header = self._files.entries[name]
                ranges, shape = [(0, self._files.nbytes(name))], list(header["shape"])
                if name == cut.names[0] or math.prod(shape) != 1:  # else one scale for all
                    _check_axis(name, cut, header["shape"], self._files.shape(cut.names[0]))
                    ranges = kept_ranges(header, cut.axis, keep, num_experts)
                    shape[cut.axis] -= num_experts - len(keep)
                entries[name] = Entry(header["dtype"], tuple(shape), sum(end - begin for begin, end in ranges))
                taken.append((name, name, ranges))

        def fill(writer: ShardWriter) -> None:
            for name, old, ranges in taken:
                self._copy(writer, name, old, ranges)

        return Step(entries, fill, layer)

    def _copy(self, writer: ShardWriter, name: str, old: str, ranges: Ranges) -> None:
        writer.write(name, self._files.pieces(old, ranges))

    def _building(self, layer: MoeLayer, plan: LayerPlan, read: ExpertReader) -> Step:
        """A container's tensors. Of a quantised checkpoint, experts' own weights are copied (own_rows.py)."""
        shapes = self._layouts[plan.layer].tensor_shapes()
        live = {leaf: f"{plan.layer}.{leaf}" for leaf in shapes}
        names = dict(zip(live, names_in_files(self._one, list(live.values())).values(), strict=True))
        own = _own_experts(plan) if self._source.quantization else ()
        copied = (
            self._cutting(self._expert_cuts(plan.layer), own, layer.shape.num_experts) if own else Step({}, _nothing)
        )
        if own:
            for leaf in [leaf for leaf in shapes if leaf.startswith(OwnWeights.prefix)]:
                rows, *row = shapes.pop(leaf)
                names[leaf] = f"{plan.layer}.{BASES}{leaf.removeprefix(OwnWeights.prefix)}"
                if rows > len(own):
                    shapes[leaf] = (rows - len(own), *row)
        packed = self._layouts[plan.layer].packed_tensors
        dtype_of = {leaf: torch.uint8 if leaf in packed else read.dtype for leaf in shapes}
        entries = {names[leaf]: _entry(dtype_of[leaf], shape) for leaf, shape in shapes.items()}

        def fill(writer: ShardWriter) -> None:
            copied.fill(writer)
            recent, of_layer = functools.lru_cache(maxsize=2)(read), self._statistics_of(plan)
            activate = canonical_activation(self._one.get_submodule(layer.shape.name))
            made = build_rows(plan, layer.shape, recent, of_layer, self._seed_of(plan), set(own), activate)
            for leaf, row, tensor in made:
                data = _bytes(tensor.to(dtype_of[leaf]))
                first = len(own) if leaf.startswith(OwnWeights.prefix) else 0
                writer.write(names[leaf], [data], (row - first) * len(data))

        return Step(copied.entries | entries, fill, plan.layer)

    def _splitting(self, layer: MoeLayer, plan: LayerPlan, read: Read, dtype: torch.dtype) -> Step:
        """Experts of a container, or changed ones, as the family's files have them."""
        splitter = ExpertSplitter(layer, self._one, dtype)
        entries = {name: _entry(dtype, shape) for name, shape in splitter.shapes(len(plan.survivors)).items()}

        def fill(writer: ShardWriter) -> None:
            for new, old in enumerate(plan.survivors):
                for name, (row, tensor) in splitter.split(new, read(old)).items():
                    data = _bytes(tensor)
                    writer.write(name, [data], row * len(data))

        return Step(entries, fill, plan.layer)

    # --- config

    def _renumbered(self) -> dict[str, Any]:
        """What config.json says of number formats, of the experts that are left."""
        numbers: dict[str, dict[int, int]] = {}
        for layer in self._source.layers:
            plan = self._plan_of(layer)
            kept = _own_experts(plan) if self._becomes_container(layer) else plan.survivors
            new_of = {old: new for new, old in enumerate(kept)}
            names = (name for cut in self._expert_cuts(layer.shape.name) for name in cut.names)
            numbers |= {found[1]: new_of for name in names if (found := ONE_EXPERT_OF.match(name))}
        return _numbered_anew(self._source.quantization, numbers)

    def _settled_config(self) -> PreTrainedConfig:
        """What the config of the live model would be."""
        config = self._one.config
        layers = [layer for layer in self._source.layers if not self._plan_of(layer).dropped]
        if not self._stock and any(len(self._plan_of(x).survivors) not in self._counts(x) for x in layers):
            leave_router_logits(self._one)
        if self._stock and self._plan.staying:
            for holder in (config, *(self._one.get_submodule(layer.shape.name).config for layer in layers)):
                set_expert_count(holder, len(self._plan.staying[0].survivors))
        if (top_k := next((each.top_k for each in self._plan.layers if each.top_k is not None), None)) is not None:
            configs = (config, *(self._one.get_submodule(layer.shape.name).config for layer in layers))
            for holder, name in places_of_top_k(layers, configs, (), top_k):
                setattr(holder, name, top_k)
        rest = self._renumbered() if self._source.quantization else None
        if self._numbering.gone:
            config = without_layers(config, self._plan.numbering)
        if self._layouts:
            named = {self._plan.numbering.name_after(name): layout.to_json() for name, layout in self._layouts.items()}
            config.quantization_config = LocumConfig(named, rest=rest)
        elif rest is not None:
            config.quantization_config = rest
        config.architectures = [type(self._one).__name__]
        return config


def _own_experts(plan: LayerPlan) -> tuple[int, ...]:
    """The experts that keep their own weights, in the order of their rows."""
    return tuple(e for e in plan.survivors if OwnWeights() in plan.slots[e].parts)


def _nothing(writer: ShardWriter) -> None:
    """What is written where there is nothing to copy."""


def _numbered(step: Step, numbering: Numbering) -> Step:
    """A step whose tensors have the names that they get where decoder layers leave."""
    entries = {numbering.name_after(name): entry for name, entry in step.entries.items()}
    return Step(entries, lambda writer: step.fill(_Renaming(writer, numbering)), step.layer)


class _Renaming:
    """A writer that is told the names of before."""

    def __init__(self, writer: ShardWriter, numbering: Numbering) -> None:
        self._writer, self._numbering = writer, numbering

    def write(self, name: str, pieces: Iterable[Any], begin: int = 0) -> None:
        self._writer.write(self._numbering.name_after(name), pieces, begin)


def _numbered_anew(said: Any, numbers: Mapping[str, Mapping[int, int]]) -> Any:
    """What a quantization_config says, with the names in it that number experts. Of those that left, nothing is said."""
    if isinstance(said, dict):
        return {key: _numbered_anew(value, numbers) for key, value in said.items()}
    if isinstance(said, list):
        return [new for one in said if (new := _numbered_anew(one, numbers)) is not None]
    found = ONE_EXPERT_OF.match(said) if isinstance(said, str) else None
    if found is None or found[1] not in numbers:
        return said
    new = numbers[found[1]].get(int(found[2]))
    return None if new is None else f"{found[1]}{new}{found[3]}"


def _check_axis(name: str, cut: Cut, shape: list[int], whole: list[int]) -> None:
    """Refuse scales that several experts share: they have no place for each along the axis of the experts."""
    if shape[cut.axis : cut.axis + 1] != whole[cut.axis : cut.axis + 1]:
        raise UnsupportedModel(
            f"{name} has shape {shape}, so experts share its scales and cannot be told apart in {cut.names[0]}; "
            f"give a checkpoint in which that tensor is not quantised"
        )


def _replace(instead: dict[str, list[Step]], cuts: Sequence[Cut], step: Step) -> None:
    """Let a step take the place of these tensors: that of the first of them."""
    names = sorted((name for cut in cuts for name in cut.names), key=dot_natural_key)
    instead |= {name: [] for name in names} | {name: [step] for name in names[:1]}


def _entry(dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
    return Entry(ENTRIES[dtype], shape, math.prod(shape) * dtype.itemsize)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
