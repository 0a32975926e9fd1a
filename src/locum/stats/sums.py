"""What calibration counts: additive float64 sums per layer and domain, and means made from them.

    events of one layer --Sums.add--> sums --Sums.statistics--> Statistics --layer(name)--> LayerStatistics

What is counted is defined in definitions.py. Because all statistics are sums, shards and files add up, domains can be
reweighted afterwards, and one file serves every criterion that reads them; only what a search finds does not add up.
Padding never reaches an event.

Precision: what comes from routers (probabilities, norms) and the products of Gram matrices are float32 or the model's own
wider type, which leaves a relative error near 1e-7 in each; what comes from experts' outputs (norms, squares) and every
sum over tokens is float64, so that long runs and differences such as a variance lose nothing more.

Letters: E experts, D model width, C domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, StatisticsError, unknown
from ..shapes import LayerShape, ModelShape
from .definitions import STATISTICS
from .events import RoutedEvent, RouterEvent, SearchEvent

ORIGIN = ("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint", "shape", "tokens")
PROVENANCE = (*ORIGIN, "versions", "command", "seed")  # what every statistics file must say of itself


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


# --- sums while collecting --------------------------------------------------------------------------------------


class Sums:
    """Running sums of one domain. Where a layer's events come from (a live model, a stream from disk) is not its business."""

    def __init__(self, domain: str, needs: tuple[str, ...]) -> None:
        self.domain = domain
        self.definitions = tuple(STATISTICS[name] for name in needs)
        self.num_tokens = 0  # counted by whoever feeds the events, for the provenance
        self._layers: dict[str, dict[str, Tensor]] = {}

    def wants(self, event: type) -> bool:
        return any(definition.event is event for definition in self.definitions)

    @property
    def wants_inside(self) -> bool:
        """Whether events must carry the experts' inputs and hidden states, which only on-demand statistics read."""
        return any(definition.event is RoutedEvent and definition.on_demand for definition in self.definitions)

    def add(self, layer: str, event: RouterEvent | RoutedEvent | SearchEvent) -> None:
        sums = self._layers.setdefault(layer, {})
        for definition in self.definitions:
            if definition.event is type(event):
                name, increment = definition.name, definition.increment(event)
                sums[name] = sums[name].add_(increment) if name in sums else increment.clone()

    def statistics(self, provenance: dict[str, Any]) -> Statistics:
        """A copy of the sums so far. Raises StatisticsError for a layer of the shape that an event is missing from."""
        shape = ModelShape.from_json(provenance["shape"])
        layers: dict[str, dict[str, Tensor]] = {}
        for name in (layer.name for layer in shape.layers):
            sums = self._layers.get(name, {})
            missing = [d.name for d in self.definitions if d.name not in sums]
            if missing:
                raise StatisticsError(
                    f"layer {name} never gave what {', '.join(missing)} need: its router or its experts were not called "
                    f"during calibration; a layer that the model skips cannot be calibrated"
                )
            layers[name] = {d.name: sums[d.name].cpu().clone().unsqueeze(0) for d in self.definitions}
        return Statistics((self.domain,), layers, {**provenance, "tokens": self.num_tokens})


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
    usual = "this one is collected on demand only" if on_demand else "by default, all but those on demand are collected"
    return f"Calibrate again with {name!r} among the needs ({usual})"


@dataclass(frozen=True, eq=False)
class _OverDomains(Mapping[str, Tensor]):
    """Sums over domains, made when they are asked for: nobody waits for Grams that nobody reads."""

    by_domain: Mapping[str, Tensor]
    weight_C: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return torch.einsum("c,c...->...", self.weight_C, self.by_domain[name])

    def __contains__(self, name: object) -> bool:
        return name in self.by_domain

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_domain)

    def __len__(self) -> int:
        return len(self.by_domain)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums of every layer, with a first axis for the domain, and where they come from. `a + b` merges two of them."""

    domains: tuple[str, ...]
    layers: Mapping[str, Mapping[str, Tensor]]  # [C, ...] float64
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if missing := [key for key in PROVENANCE if key not in self.provenance]:
            raise StatisticsError(f"statistics lack {', '.join(missing)} in their provenance; calibrate again")
        for layer, named in self.layers.items():
            for name, tensor in named.items():
                if tensor.shape[:1] != (len(self.domains),) or tensor.dtype != torch.float64:
                    raise StatisticsError(
                        f"{name} of layer {layer} is {tensor.dtype} of shape {list(tensor.shape)}; expected float64 with "
                        f"a first axis of {len(self.domains)} domains ({', '.join(self.domains)}); calibrate again"
                    )

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_json(self.provenance["shape"])

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics that every layer has."""
        return tuple(sorted(set.intersection(*(set(named) for named in self.layers.values()))))

    def layer(self, name: str, weights: Mapping[str, float] | None = None) -> LayerStatistics:
        """One layer summed over domains; with `weights`, each domain's sums times its weight (0 if it is not named).

        Raises StatisticsError for an unknown layer or domain and OptionError for weights that cannot weigh.
        """
        if name not in self.layers:
            raise StatisticsError(unknown("layer in the statistics", name, self.layers))
        weight_C = self._weights(weights)
        return LayerStatistics(self.shape.layer(name), _OverDomains(self.layers[name], weight_C))

    def _weights(self, weights: Mapping[str, float] | None) -> Tensor:
        if weights is None:
            return torch.ones(len(self.domains), dtype=torch.float64)
        for domain, weight in weights.items():
            if domain not in self.domains:
                raise StatisticsError(unknown("domain in the statistics", domain, self.domains))
            if not math.isfinite(weight) or weight < 0:
                raise OptionError(f"domain {domain!r} has weight {weight!r}; allowed: finite numbers from 0")
        if not any(weights.values()):
            raise OptionError(f"all domain weights are 0; give a positive one to at least one of {list(self.domains)}")
        return torch.tensor([float(weights.get(d, 0)) for d in self.domains], dtype=torch.float64)

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        check_same_origin(self.provenance, other.provenance)
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
                total = tensor.new_zeros(len(domains), *tensor.shape[1:])
                for part, part_tensor in ((self, tensor), (other, other.layers[layer][name])):
                    total.index_add_(0, torch.tensor([domains.index(d) for d in part.domains]), part_tensor)
                layers[layer][name] = total
        return Statistics(domains, layers, _merge_provenance(self.provenance, other.provenance))


def check_same_origin(one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    """Raise StatisticsError unless two provenances name the same model, tokenizer and shape of MoE layers."""
    sides = [
        {**{key: p[key] for key in ORIGIN[:2]}, "shape": ModelShape.from_json(p["shape"]).fingerprint}
        for p in (one, two)
    ]
    for key, first in sides[0].items():
        if first != sides[1][key]:
            raise StatisticsError(
                f"statistics cannot be added: {key} is {first!r} on one side and {sides[1][key]!r} on the other; only "
                f"statistics of the same model and tokenizer add up: calibrate both with them"
            )


def _check_same_names(one: Statistics, two: Statistics) -> None:
    for layer in dict.fromkeys((*one.layers, *two.layers)):
        names = [", ".join(sorted(s.layers.get(layer, ()))) or "none" for s in (one, two)]
        if names[0] != names[1]:
            raise StatisticsError(
                f"statistics cannot be added: layer {layer} has {names[0]} on one side and {names[1]} on the other; "
                f"collect the same statistics for both"
            )


def _merge_provenance(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """What both agree on stays; tokens add up; where they differ, a list of all values in order."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys((*one, *two)):
        if key == "tokens":
            merged[key] = one[key] + two[key]
        elif key == "shape" or one.get(key) == two.get(key):
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
    return layer["output_sum"] / _at_least_one(layer["count"])[:, None]


def output_variance(layer: LayerStatistics) -> Tensor:
    """[E, D] unbiased variance of the ungated output; 0 with fewer than two tokens.

    (sum f^2 - n mean^2) / (n - 1), with n = count. Needs count, output_sum, output_square. Domain weights act as if
    every token had been seen that many times. Rounding can push a constant output below 0; it is held at 0.
    """
    count_E1 = layer["count"][:, None]
    spread_ED = layer["output_square"] - count_E1 * mean_output(layer).square()
    variance_ED = spread_ED.clamp(min=0) / torch.where(count_E1 > 1, count_E1 - 1, 1.0)
    return torch.where(count_E1 > 1, variance_ED, 0.0)


def _at_least_one(count_E: Tensor) -> Tensor:
    """Counts to divide by. Weighted counts may lie between 0 and 1, so only 0 itself is replaced."""
    return torch.where(count_E > 0, count_E, 1.0)
