"""What calibration counts: additive float64 sums per layer and domain, their definitions, and means made from them.

    events of one layer --Sums.add--> sums --Sums.statistics--> Statistics --layer(name)--> LayerStatistics

A definition turns one event (what a router or the experts of one layer did with one batch of one domain) into what it
adds. It knows nothing of models or files. Because all statistics are sums, shards and files add up, domains can be
reweighted afterwards, and one file serves every criterion that reads them. Padding never reaches an event.

Precision: elementwise values (norms, squares, probabilities) are float32 or the model's own wider type, which leaves a
relative error near 1e-7 in each; every sum over tokens is float64, so that long runs and differences such as a variance
lose nothing more.

Letters: T tokens, P selected (token, expert) pairs sorted by expert, N tokens of one expert or sample, E experts,
D model width, C domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import OptionError, StatisticsError, unknown
from .registry import Registry
from .shapes import LayerShape, ModelShape

ORIGIN = ("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint", "shape", "tokens")
PROVENANCE = (*ORIGIN, "versions", "command", "seed")  # what every statistics file must say of itself


# --- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RouterEvent:
    """What a layer's router said about one batch: raw logits, samples one after the other, padding left out."""

    logits_TE: Tensor
    sample_lengths: tuple[int, ...]  # tokens of each sample, none of them 0; they add up to T

    @cached_property
    def wide_TE(self) -> Tensor:
        return _wide(self.logits_TE)


@dataclass(frozen=True, eq=False)
class RoutedEvent:
    """What a layer's experts did with one batch: its selected pairs sorted by expert, padding left out."""

    expert_P: Tensor
    gate_P: Tensor  # the weights that the model multiplies the outputs with
    out_PD: Tensor  # outputs before the gate
    counts: tuple[int, ...]  # pairs of each of the E experts; on the host, because they cut tensors

    @cached_property
    def norm_P(self) -> Tensor:
        return torch.linalg.vector_norm(self.wide_PD, dim=-1).double()

    @cached_property
    def wide_PD(self) -> Tensor:
        return _wide(self.out_PD)

    def sum_pairs(self, value_P: Tensor) -> Tensor:
        """[E] sums of one number per pair. Unlike index_add_ it gives the same bits every time on a GPU too."""
        lengths_E = torch.tensor(self.counts, device=value_P.device)
        return torch.segment_reduce(value_P.double(), "sum", lengths=lengths_E, unsafe=True)

    def sum_rows(self, term: Callable[[Tensor], Tensor]) -> Tensor:
        """[E, D] sums of `term` of every output, one expert at a time: no second [P, D] tensor, and far no float64 one."""
        parts = self.wide_PD.split(list(self.counts))
        return torch.stack([term(out_ND).sum(dim=0, dtype=torch.float64) for out_ND in parts])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


# --- definitions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatisticDefinition:
    """One statistic: a function from an event to the increment of its sum, its axes and the kind of event it takes."""

    name: str
    axes: str  # one letter per axis, "" for a single number
    event: type
    increment: Callable[[Any], Tensor]


STATISTICS: Registry[StatisticDefinition] = Registry("statistic", entry_points="locum.statistics")


def statistic(name: str, axes: str, event: type) -> Callable[[Callable[[Any], Tensor]], Callable[[Any], Tensor]]:
    """Register the function below as the definition of a statistic."""

    def register(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        STATISTICS.add(name, StatisticDefinition(name, axes, event, function))
        return function

    return register


@statistic("tokens", axes="", event=RouterEvent)
def tokens(event: RouterEvent) -> Tensor:
    """The number of tokens that passed the router, for means over all tokens.

    sum_t 1

    Needs:    every token's router logits (their number).
    Shapes:   a single number.
    Units:    tokens.
    Edges:    padding is not counted; 0 for a domain without tokens.
    Cost:     none.
    Source:   not from a paper.
    """
    return torch.tensor(float(len(event.logits_TE)), dtype=torch.float64)


@statistic("samples", axes="", event=RouterEvent)
def samples(event: RouterEvent) -> Tensor:
    """The number of samples (blocks of text that the model sees as one sequence), for means over samples.

    sum_s 1

    Needs:    the samples' lengths.
    Shapes:   a single number.
    Units:    samples.
    Edges:    a sample of nothing but padding is not counted.
    Cost:     none.
    Source:   not from a paper.
    """
    return torch.tensor(float(len(event.sample_lengths)), dtype=torch.float64)


@statistic("softmax_sum", axes="E", event=RouterEvent)
def softmax_sum(event: RouterEvent) -> Tensor:
    """Router probability that all tokens together gave an expert, selected or not.

    sum_t softmax(logits_t)_e over all E experts

    Needs:    every token's router logits.
    Shapes:   (E,).
    Units:    tokens (an expert's probability mass); sums to `tokens` within a layer.
    Edges:    a never-selected expert has a positive value; sigmoid routers get the softmax all the same.
    Cost:     one softmax over T*E.
    Source:   soft counts of SEER-MoE, arXiv 2404.05089, and Expert Drop, arXiv 2406.02500.
    """
    return event.wide_TE.softmax(dim=-1).sum(dim=0, dtype=torch.float64)


@statistic("logit_norm", axes="", event=RouterEvent)
def logit_norm(event: RouterEvent) -> Tensor:
    """How strongly the router speaks in this layer, for LightMoE's layer weights.

    sum_t ||logits_t||_2

    Needs:    every token's raw router logits.
    Shapes:   a single number.
    Units:    logits; comparable across layers per token; LightMoE compresses layers with more of it less.
    Edges:    0 without tokens.
    Cost:     one pass over T*E.
    Source:   LightMoE, arXiv 2603.12645, section 3.1. Differs: the paper says "norm of the router output" without a
              definition; its figure suggests a norm over a sample's whole logit matrix. Only ratios between layers
              enter, which the two readings leave nearly equal.
    """
    return torch.linalg.vector_norm(event.wide_TE, dim=-1).sum(dtype=torch.float64)


@statistic("logit_cosine", axes="EE", event=RouterEvent)
def logit_cosine(event: RouterEvent) -> Tensor:
    """How alike two experts are routed: the cosine of their logits over a sample's tokens, summed over samples.

    sum_s cos(L_s[:, i], L_s[:, j]),  L_s = the raw logits [N, E] of sample s

    Needs:    every token's raw router logits, and where samples begin; divide by `samples` for the mean.
    Shapes:   (E, E), symmetric.
    Units:    samples (a cosine per sample, -1 to 1; higher is more alike).
    Edges:    an expert whose logits are 0 on a whole sample has cosine 0 with all, itself included.
    Cost:     E*E float64 per layer and domain; one product of T*E*E.
    Source:   LightMoE, arXiv 2603.12645, section 3.2. Differs: MC-SMoE's code, which it follows, maps cosines to
              (cos + 1) / 2 over a whole batch; the order of pairs within a sample is the same.
    """
    num_experts = event.logits_TE.shape[1]
    total_EE = event.wide_TE.new_zeros(num_experts, num_experts, dtype=torch.float64)
    for logits_NE in event.wide_TE.split(list(event.sample_lengths)):
        norm_E = torch.linalg.vector_norm(logits_NE, dim=0)
        unit_NE = logits_NE / torch.where(norm_E > 0, norm_E, 1.0)
        total_EE += unit_NE.T @ unit_NE
    return total_EE


@statistic("count", axes="E", event=RoutedEvent)
def count(event: RoutedEvent) -> Tensor:
    """The number of tokens that selected an expert.

    n_e = sum_t [e in selected(t)]

    Needs:    routed tokens.
    Shapes:   (E,).
    Units:    tokens; sums to top_k * tokens within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     none.
    Source:   hard counts of SEER-MoE, arXiv 2404.05089; EUF of MC-Suite, arXiv 2504.05586.
    """
    return torch.tensor(event.counts, dtype=torch.float64)


@statistic("gate_sum", axes="E", event=RoutedEvent)
def gate_sum(event: RoutedEvent) -> Tensor:
    """The weight that the model gave an expert's outputs, over the tokens that selected it.

    sum_{t routed to e} g_t,e,  g = exactly the weights that the model passes to its experts module

    Needs:    routed tokens.
    Shapes:   (E,).
    Units:    gates, after the model's own renormalisation and scaling; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     none to speak of.
    Source:   LightMoE, arXiv 2603.12645, Eq. 2, read with gates masked to the selected experts as its Eq. 1 uses them.
    """
    return event.sum_pairs(event.gate_P)


@statistic("output_norm", axes="E", event=RoutedEvent)
def output_norm(event: RoutedEvent) -> Tensor:
    """The size of what an expert said, before its gate.

    sum_{t routed to e} ||f_e(x_t)||_2

    Needs:    routed tokens' expert outputs.
    Shapes:   (E,).
    Units:    hidden-state L2 norm; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     one pass over P*D, shared with gated_output_norm.
    Source:   "ean_sum" of REAP's code, arXiv 2510.13999.
    """
    return event.sum_pairs(event.norm_P)


@statistic("gated_output_norm", axes="E", event=RoutedEvent)
def gated_output_norm(event: RoutedEvent) -> Tensor:
    """The size of what an expert contributed, after its gate.

    sum_{t routed to e} g_t,e ||f_e(x_t)||_2

    Needs:    routed tokens' gates and expert outputs.
    Shapes:   (E,).
    Units:    hidden-state L2 norm; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     one pass over P*D, shared with output_norm.
    Source:   REAP, arXiv 2510.13999. Differs: its code takes g from the full softmax by default; here g is what the
              model uses (they agree where gates are neither renormalised nor scaled).
    """
    return event.sum_pairs(event.norm_P * event.gate_P)


@statistic("output_sum", axes="ED", event=RoutedEvent)
def output_sum(event: RoutedEvent) -> Tensor:
    """The sum of an expert's outputs, from which its mean output (a constant stand-in) is made.

    sum_{t routed to e} f_e(x_t)

    Needs:    routed tokens' expert outputs.
    Shapes:   (E, D).
    Units:    hidden state.
    Edges:    0 for a never-routed expert.
    Cost:     E*D float64 per layer and domain; one pass over P*D.
    Source:   the novices of MoNE, arXiv 2507.00390.
    """
    return event.sum_rows(lambda out_ND: out_ND)


@statistic("output_square", axes="ED", event=RoutedEvent)
def output_square(event: RoutedEvent) -> Tensor:
    """The sum of squares of an expert's outputs, from which their variance is made.

    sum_{t routed to e} f_e(x_t)^2, elementwise

    Needs:    routed tokens' expert outputs.
    Shapes:   (E, D).
    Units:    hidden state squared.
    Edges:    0 for a never-routed expert.
    Cost:     E*D float64 per layer and domain; one pass over P*D.
    Source:   the variance of MoNE, arXiv 2507.00390; EAN of MC-Suite, arXiv 2504.05586.
    """
    return event.sum_rows(torch.square)


def check_needs(needs: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the statistics to collect: all of them for None. Raises OptionError for an unknown one."""
    names = tuple(STATISTICS) if needs is None else tuple(dict.fromkeys(needs))
    if not names:
        raise OptionError(f"no statistics to collect; name at least one of: {', '.join(STATISTICS)}")
    return tuple(STATISTICS[name].name for name in names)


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

    def add(self, layer: str, event: RouterEvent | RoutedEvent) -> None:
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
                f"Calibrate again with {name!r} among the needs (all statistics are collected by default)"
            )
        return self.sums[name]

    def __contains__(self, name: object) -> bool:
        return name in self.sums

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


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
        sums = {key: torch.einsum("c,c...->...", weight_C, tensor) for key, tensor in self.layers[name].items()}
        return LayerStatistics(self.shape.layer(name), sums)

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
