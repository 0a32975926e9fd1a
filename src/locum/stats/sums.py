"""What calibration counts: mergeable float64 sums (and a few maxima) per layer and domain, and means made from them.

    events of one layer --Sums.add--> sums --Sums.statistics--> Statistics --layer(name)--> LayerStatistics

What is counted is defined in definitions.py. Because all statistics merge (merging.py), shards and files add up, and one file
serves every criterion that reads them; only what a search finds does not add up. Padding never reaches an event.

Precision: what comes from routers (probabilities, norms) and the products of Gram matrices are float32 or the model's own
wider type, which leaves a relative error near 1e-7 in each; what comes from experts' outputs (norms, squares) and every
sum over tokens is float64, so that long runs and differences such as a variance lose nothing more.

Letters: E experts, D model width, Z domains.
"""

from __future__ import annotations

import functools
import json
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..errors import OptionError, StatisticsError, unknown
from ..files import fingerprint
from ..runs import differences
from ..shapes import LayerShape, ModelShape
from .definitions import STATISTICS
from .events import Event, Rows
from .merging import SAMPLE_ROWS, merge_into, merge_of, over_domains
from .on_disk import Stack
from .origin import Origin, SearchedBy
from .shares import BINS
from .stand_ins import CANDIDATES

GRAMS = ("input_gram", "hidden_gram")  # which `calibrate` collects unless it is told not to
SAMPLES = 64  # values of each sum that tell some statistics from others

# --- what to collect --------------------------------------------------------------------------------------------


def check_needs(needs: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the statistics to collect: for None all but those that are collected on demand only.

    Raises OptionError for an unknown one and for one that calibration cannot give because a search finds it.
    """
    default = tuple(name for name, item in STATISTICS.items() if not item.on_demand)
    names = default if needs is None else tuple(dict.fromkeys(needs))
    if not names:
        raise OptionError(f"no statistics to collect; name at least one of: {', '.join(STATISTICS)}")
    if searched := [name for name in names if STATISTICS[name].searched]:
        raise OptionError(
            f"calibration does not give {', '.join(searched)}: trying removals on the model does; run `locum search`, and "
            f"make the plan from the file it writes"
        )
    return names


def is_pooled(name: str) -> bool:
    """Whether a statistic is added up over all domains together."""
    return name in STATISTICS and not STATISTICS[name].by_domain


# --- sums while collecting --------------------------------------------------------------------------------------


class Sums:
    """Running sums of one domain. A layer's events may come from anywhere: a live model, a stream from disk.

    Statistics that are not kept apart by domain go to `pooled`, which the sums of all domains share, or to one of its own.
    """

    def __init__(self, domain: str, needs: tuple[str, ...], pooled: Pooled | None = None) -> None:
        self.domain = domain
        self.definitions = tuple(STATISTICS[name] for name in needs)
        self.pooled, self._shares = pooled or Pooled(), pooled is not None
        self.num_tokens = 0  # counted by the caller that feeds the events
        self._layers: dict[str, dict[str, Tensor]] = {}

    def add(self, layer: str, event: Event) -> None:
        sums = self._layers.setdefault(layer, {})
        for definition in self.definitions:
            if definition.event is type(event):
                name, increment = definition.name, definition.increment(event)
                if not definition.by_domain:
                    self.pooled.add(layer, name, increment)
                    continue
                known, how = name in sums, definition.merge
                sums[name] = merge_into(sums[name].to(increment.device), increment, how) if known else increment.clone()

    def statistics(self, origin: Origin, provenance: Mapping[str, Any] | None = None) -> Statistics:
        """A copy of the sums so far, without what is pooled with others. Raises StatisticsError for a layer of the shape that an
        event is missing from."""
        layers: dict[str, dict[str, Tensor]] = {}
        for name in (layer.name for layer in origin.shape.layers):
            sums, pooled = self._layers.get(name, {}), self.pooled.of(name)
            missing = [d.name for d in self.definitions if d.name not in (sums if d.by_domain else pooled)]
            if missing:
                raise StatisticsError(
                    f"layer {name} never gave what {', '.join(missing)} need: its router or its experts were not called "
                    f"during calibration; a layer that the model skips cannot be calibrated"
                )
            layers[name] = {d.name: sums[d.name].cpu().clone().unsqueeze(0) for d in self.definitions if d.by_domain}
        found = Statistics((self.domain,), layers, origin, self.num_tokens, dict(provenance or {}))
        return found if self._shares else self.pooled.joined_to(found)


class Pooled:
    """Running sums of what is too large to be kept for every domain: one float64 tensor a layer, on the host, added to a row at a
    time. With a folder they lie in files there (on_disk.py)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._layers: dict[str, dict[str, Stack | Tensor]] = {}

    def add(self, layer: str, name: str, increment: Tensor | Rows) -> None:
        totals, shape = self._layers.setdefault(layer, {}), tuple(increment.shape)
        if name in totals and merge_of(name) == "same":
            return
        if name not in totals:
            in_memory = self._folder is None
            totals[name] = torch.zeros(shape, dtype=torch.float64) if in_memory else Stack(self._folder, shape)
        total, rows = totals[name], increment.rows if isinstance(increment, Rows) else increment
        for row, more in enumerate(rows):
            if isinstance(total, Stack):
                total.add(row, more.cpu())
            else:
                total[row].add_(more.cpu())

    def merge_ranks(self, layer: str, name: str, shape: tuple[int, ...]) -> None:
        """Merge what the other ranks have, a row at a time. Every rank must ask, also one that has nothing."""
        if name not in self.of(layer):
            self.add(layer, name, Rows(shape, ()))
        total = self._layers[layer][name]
        for row in total.tensor() if isinstance(total, Stack) else total:
            ranks.merge(row, merge_of(name))

    def of(self, layer: str) -> Mapping[str, Stack | Tensor]:
        return self._layers.get(layer, {})

    def joined_to(self, statistics: Statistics) -> Statistics:
        """The statistics and these sums, which are no copy: the next event adds to them."""
        layers = {
            layer: ChainMap({**named}, _OfAllDomains(self.of(layer))) for layer, named in statistics.layers.items()
        }
        return replace(statistics, layers=layers)


@dataclass(frozen=True, eq=False)
class _OfAllDomains(Mapping[str, Tensor]):
    """One layer's pooled sums with a first axis of one, mapped when they are asked for."""

    totals: Mapping[str, Stack | Tensor]

    def __getitem__(self, name: str) -> Tensor:
        total = self.totals[name]
        return (total.tensor() if isinstance(total, Stack) else total).unsqueeze(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.totals)

    def __len__(self) -> int:
        return len(self.totals)


def taken_up(
    statistics: Statistics, domain: str | None, needs: tuple[str, ...], folder: Path | None = None
) -> tuple[Statistics | None, Sums | None, Pooled]:
    """Statistics in three: what is done with, the running sums of one domain, to which the next events add, and those that are
    pooled over domains.

    The sums are those that were saved, so adding goes on to the bit. Statistics count the tokens of all domains
    together: where the domain has begun, its sums have that count.
    """
    pooled, layers = Pooled(folder), {}
    for layer, named in statistics.layers.items():
        apart = [name for name in named if is_pooled(name)]
        for name in apart:
            for domains in named[name]:
                pooled.add(layer, name, domains)
        layers[layer] = {name: named[name] for name in named if name not in apart}
    statistics = replace(statistics, layers=layers)
    if domain is None:
        return statistics, None, pooled
    sums = Sums(domain, needs, pooled)
    if domain not in statistics.domains:
        return statistics, sums, pooled
    row = statistics.domains.index(domain)
    sums.num_tokens = statistics.tokens
    sums._layers = {
        layer: {name: tensor[row].clone() for name, tensor in named.items()}
        for layer, named in statistics.layers.items()
    }
    rest = [i for i in range(len(statistics.domains)) if i != row]
    if not rest:
        return None, sums, pooled
    layers = {layer: {n: tensor[rest] for n, tensor in named.items()} for layer, named in statistics.layers.items()}
    rest_domains = tuple(statistics.domains[i] for i in rest)
    return replace(statistics, domains=rest_domains, layers=layers, tokens=0), sums, pooled


# --- the result -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerStatistics(Mapping[str, Tensor]):
    """One layer's sums over domains, by statistic name, with the shape of the layer."""

    shape: LayerShape
    sums: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            raise StatisticsError(
                f"layer {self.shape.name} has no statistic {name!r}; it has: {', '.join(sorted(self.sums)) or 'none'}. "
                f"{_how_to_get(name)}"
            )
        return self.sums[name]

    def __contains__(self, name: object) -> bool:
        return name in self.sums

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def _how_to_get(name: str) -> str:
    if name in STATISTICS and STATISTICS[name].searched:
        return "Run `locum search`, which finds it on the model, and make the plan from the file it writes"
    on_demand = name in STATISTICS and STATISTICS[name].on_demand
    if name in GRAMS:
        return f"Calibrate again with {name!r} among the needs: locum calibrate collects it unless --no-gram is given"
    usual = "this one is collected on demand only" if on_demand else "by default, all but those on demand are collected"
    return f"Calibrate again with {name!r} among the needs (--also {name}; {usual})"


def nbytes(shape: ModelShape, names: Sequence[str], domains: int = 1) -> int:
    """Bytes of these statistics of so many domains."""
    each = (
        (axis_sizes(layer, STATISTICS[name].axes, shape.vocab_size), STATISTICS[name].by_domain)
        for layer in shape.layers
        for name in names
    )
    return torch.float64.itemsize * sum(math.prod(sizes) * (domains if by_domain else 1) for sizes, by_domain in each)


def axis_sizes(layer: LayerShape, axes: str, vocab_size: int = 0) -> tuple[int, ...]:
    """The shape of a statistic of one layer and domain, from the letters of its axes (X: numbers of experts that go,
    U: rows of a sample, H: bins of a histogram, C: candidates)."""
    sizes = {"E": layer.num_experts, "D": layer.hidden_size, "F": layer.expert_width, "G": layer.gate_width}
    sizes |= {"V": vocab_size, "X": layer.num_experts, "U": SAMPLE_ROWS, "H": BINS, "C": CANDIDATES}
    return tuple(sizes[axis] for axis in axes)


@dataclass(frozen=True, eq=False)
class _OverDomains(Mapping[str, Tensor]):
    """Sums over domains, made when they are asked for: Grams that nothing reads take no time."""

    by_domain: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return over_domains(self.by_domain[name], merge_of(name))

    def __contains__(self, name: object) -> bool:
        return name in self.by_domain

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_domain)

    def __len__(self) -> int:
        return len(self.by_domain)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums of every layer, with a first axis for the domain, and where they come from. `a + b` merges two of them.

    Statistics that are not kept apart by domain have one row there for all of them.

    `provenance` is words for people: versions, command, time, sources. Nothing is decided by it.
    """

    domains: tuple[str, ...]
    layers: Mapping[str, Mapping[str, Tensor]]  # [Z, ...] float64
    origin: Origin
    tokens: int
    provenance: dict[str, Any] = field(default_factory=dict)
    searched: SearchedBy | None = None  # where a search added what it found
    next_block: int | None = None  # where an interrupted pass over the data goes on
    asked: Mapping[str, Any] | None = None  # what else the numbers depend on, as JSON; None where they were added up

    def __post_init__(self) -> None:
        shapes = {layer.name: layer for layer in self.origin.shape.layers}
        for layer, named in self.layers.items():
            for name, tensor in named.items():
                first = (1,) if is_pooled(name) and tensor.shape[:1] == (1,) else (len(self.domains),)
                known = name in STATISTICS and layer in shapes
                vocab_size = self.origin.shape.vocab_size
                axes = STATISTICS[name].axes if known else ""
                rest = axis_sizes(shapes[layer], axes, vocab_size) if known else tuple(tensor.shape[1:])
                if tuple(tensor.shape) != (*first, *rest) or tensor.dtype != torch.float64:
                    raise StatisticsError(
                        f"{name} of layer {layer} is {tensor.dtype} of shape {list(tensor.shape)}; expected float64 of shape "
                        f"{[*first, *rest]}, the first axis being that of the {len(self.domains)} domains "
                        f"({', '.join(self.domains)}); calibrate again"
                    )

    @property
    def shape(self) -> ModelShape:
        return self.origin.shape

    @functools.cached_property
    def id(self) -> str:
        """A hash of what these are of, what was asked, and a sample of every sum: by it a plan names them."""
        searched = None if self.searched is None else asdict(self.searched)
        origin = asdict(self.origin) | {"shape": self.shape.to_json()}
        said = [self.domains, origin, self.tokens, searched, self.asked]
        parts: list[bytes | str] = [json.dumps(said, sort_keys=True, default=str)]
        for layer, named in sorted(self.layers.items()):
            for name, tensor in sorted(named.items()):
                values = tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)]
                parts += [f"{layer}|{name}|{list(tensor.shape)}", values.numpy().tobytes()]
        return fingerprint(*parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics that every layer has."""
        return tuple(sorted(set.intersection(*(set(named) for named in self.layers.values()))))

    def unlike(self, origin: Origin, asked: Mapping[str, Any]) -> str:
        """How the question that these answer differs from this one, in words; empty where it does not."""
        return differences(
            {**self.origin.words(), "shape": self.shape.fingerprint, **(self.asked or {})},
            {**origin.words(), "shape": origin.shape.fingerprint, **asked},
        )

    def words(self) -> dict[str, Any]:
        """All that is to be said of the statistics, for people."""
        searched = {} if self.searched is None else {"search": asdict(self.searched)}
        return {**self.provenance, **self.origin.words(), "tokens": self.tokens, **searched}

    def layer(self, name: str) -> LayerStatistics:
        """One layer summed over domains. Raises StatisticsError for an unknown layer."""
        if name not in self.layers:
            raise StatisticsError(unknown("layer in the statistics", name, self.layers))
        return LayerStatistics(self.shape.layer(name), _OverDomains(self.layers[name]))

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        origin = self.origin + other.origin
        _check_same_names(self, other)
        if searched := [name for name in self.names if name in STATISTICS and STATISTICS[name].searched]:
            raise StatisticsError(
                f"statistics cannot be added: {', '.join(searched)} are what one search found, not sums; search once, over "
                f"all of the data"
            )
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        layers: dict[str, dict[str, Tensor]] = {}
        for layer, named in self.layers.items():
            layers[layer] = {}
            for name, tensor in named.items():
                more, how = other.layers[layer][name], merge_of(name)
                if is_pooled(name):
                    both = (over_domains(part, how).clone() for part in (tensor, more))
                    layers[layer][name] = merge_into(*both, how).unsqueeze(0)
                    continue
                total = tensor.new_zeros(len(domains), *tensor.shape[1:])
                for part, part_tensor in ((self, tensor), (other, more)):
                    rows = torch.tensor([domains.index(d) for d in part.domains])
                    total[rows] = merge_into(total[rows], part_tensor, how)
                layers[layer][name] = total
        words = _merge_provenance(self.provenance, other.provenance)
        return Statistics(domains, layers, origin, self.tokens + other.tokens, words)


def _check_same_names(one: Statistics, two: Statistics) -> None:
    for layer in dict.fromkeys((*one.layers, *two.layers)):
        names = [", ".join(sorted(s.layers.get(layer, ()))) or "none" for s in (one, two)]
        if names[0] != names[1]:
            raise StatisticsError(
                f"statistics cannot be added: layer {layer} has {names[0]} on one side and {names[1]} on the other; "
                f"collect the same statistics for both"
            )


def _merge_provenance(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """What both agree on stays; where they differ, a list of all values in order."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys((*one, *two)):
        if key in one and key in two and one[key] == two[key]:
            merged[key] = one[key]
        else:
            values: list[Any] = []
            for value in (p[key] for p in (one, two) if key in p):
                values += value if isinstance(value, list) else [value]
            merged[key] = [v for i, v in enumerate(values) if v not in values[:i]]
    return merged


# --- derived ----------------------------------------------------------------------------------------------------


def mean_output(layer: LayerStatistics) -> Tensor:
    """[E, D] mean ungated output over routed tokens; 0 for a never-routed expert. Needs count and output_sum."""
    return layer["output_sum"] / layer["count"].clamp(min=1)[:, None]


def output_variance(layer: LayerStatistics) -> Tensor:
    """[E, D] unbiased variance of the ungated output; 0 with fewer than two tokens.

    (sum f^2 - n mean^2) / (n - 1), with n = count. Needs count, output_sum, output_square. Rounding can push a constant
    output below 0; it is held at 0.
    """
    count_E1 = layer["count"][:, None]
    spread_ED = layer["output_square"] - count_E1 * mean_output(layer).square()
    variance_ED = spread_ED.clamp(min=0) / torch.where(count_E1 > 1, count_E1 - 1, 1.0)
    return torch.where(count_E1 > 1, variance_ED, 0.0)
