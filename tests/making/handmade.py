"""Statistics made by hand: random routing and random outputs, put through the real definitions. Numbers, no model.

Letters: T tokens, K top-k, E experts, D model width, F expert width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from locum.budgets.counts import lowest
from locum.budgets.sets import removed_mask
from locum.data.tokens import Tokens
from locum.experts.weights import ExpertWeights
from locum.methods import Method, Weights
from locum.plans.plan import LayerPlan
from locum.shapes import LayerShape, ModelShape
from locum.stats.definitions import STATISTICS
from locum.stats.events import DecoderLayerEvent, EveryExpertEvent, RoutedEvent, RouterEvent, WeightsEvent
from locum.stats.origin import Origin
from locum.stats.stand_ins import CANDIDATES
from locum.stats.sums import Statistics, Sums

SAMPLES = (20, 30, 14)
VOCABULARY = 32


def toy_shape(
    layers: int = 3, experts: int = 16, top_k: int = 2, d: int = 256, f: int = 128, **more: int
) -> ModelShape:
    """Wide enough (as numbers) that a rank-16 adapter saves most of an expert. Around experts a decoder layer has 500 numbers."""
    more = {"around_numel": 500, "around_bytes": 1000} | more
    shapes = [
        LayerShape(
            f"model.layers.{i}.experts", experts, top_k, d, f, f"model.layers.{i}.gate", "softmax", False, **more
        )
        for i in range(layers)
    ]
    routed = sum(shape.num_experts * shape.parameters() for shape in shapes)
    return ModelShape("toy", tuple(shapes), routed + 5000, 2 * routed + 10000, 2, vocab_size=VOCABULARY)


def statistics_of(sums: list[Sums], shape: ModelShape) -> Statistics:
    parts = [s.statistics(Origin(shape)) for s in sums]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def make_statistics(shape: ModelShape, seed: int = 0, never: tuple[int, ...] = (), domains: int = 2) -> Statistics:
    """Routing that prefers some experts and differs between layers; the experts in `never` are never selected.

    What a search would find is made up: it drops the two experts (or one of every group) that contributed least.
    """
    made = _made(shape, seed, never, domains)
    return dataclasses.replace(made, layers={name: dict(named) for name, named in made.layers.items()})


@functools.cache
def _made(shape: ModelShape, seed: int, never: tuple[int, ...], domains: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    of_text = tuple(name for name, definition in STATISTICS.items() if definition.event in (RouterEvent, RoutedEvent))
    summed = (*of_text, "output_cosine", "output_hsic", "every_output_sum", "weight_product", "router_product")
    summed += ("stable_rank", "decoder_turn_sum")
    domain_sums = [Sums(f"domain{i}", summed) for i in range(domains)]
    for index, layer in enumerate(shape.layers):
        num_experts, d = layer.num_experts, layer.hidden_size
        prefer_E, mean_ED, scale_E = 0.4 * normal(num_experts), normal(num_experts, d), normal(num_experts).exp()
        for sums in domain_sums:
            logits_TE = (normal(sum(SAMPLES), num_experts) + prefer_E) * (1 + 0.5 * index)
            masked_TE = logits_TE.clone()
            masked_TE[:, list(never)] = -torch.inf
            index_TK = masked_TE.topk(layer.top_k).indices
            gate_TK = logits_TE.softmax(dim=-1).gather(1, index_TK)
            expert_P, order_P = index_TK.flatten().sort(stable=True)
            out_PD = (normal(len(expert_P), d) + mean_ED[expert_P]) * scale_E[expert_P, None]
            counts = tuple(torch.bincount(expert_P, minlength=num_experts).tolist())
            sums.add(layer.name, RouterEvent(logits_TE, SAMPLES))
            inside = (normal(len(expert_P), d), normal(len(expert_P), layer.expert_width))
            token_P = order_P // layer.top_k
            seen = (token_P, token_P % VOCABULARY, torch.rand(len(token_P), generator=generator), VOCABULARY)
            sums.add(layer.name, RoutedEvent(expert_P, gate_TK.flatten()[order_P], out_PD, counts, *inside, *seen))
            sums.num_tokens = sum(SAMPLES)
            out_TED = normal(8, num_experts, d) + mean_ED
            sums.add(layer.name, EveryExpertEvent(out_TED))
        weights = tuple(
            (normal(4, 6), normal(4, 6), normal(6, 4)) for _ in range(num_experts)
        )  # small: numbers are all that counts
        apart = torch.Generator().manual_seed(1000 * seed + index)
        for sums in domain_sums:
            before_TD, change_TD = torch.randn(2, sum(SAMPLES), 8, generator=apart)
            sums.add(layer.name, DecoderLayerEvent(before_TD, before_TD + (1 + index % 3) * change_TD))
            sums.add(layer.name, WeightsEvent(weights, normal(num_experts, 6)))
    return with_weights(with_search(statistics_of(domain_sums, shape)), generator)


def with_weights(statistics: Statistics, generator: torch.Generator) -> Statistics:
    """The statistics and, as if they were of weights, `down_column_square`."""
    layers = {}
    for layer in statistics.shape.layers:
        square_EF = torch.randn(
            layer.num_experts, layer.expert_width, generator=generator, dtype=torch.float64
        ).square()
        by_domain = square_EF.expand(len(statistics.domains), *square_EF.shape)
        layers[layer.name] = {**statistics.layers[layer.name], "down_column_square": by_domain}
    return dataclasses.replace(statistics, layers=layers)


def with_search(statistics: Statistics) -> Statistics:
    """The statistics and, as if a search had found them, `dropped` and `pruned_importance`, in the first domain."""
    layers = {}
    for layer in statistics.shape.layers:
        worth_E = statistics.layer(layer.name)["gated_output_norm"]
        dropped_E = torch.zeros_like(worth_E)
        dropped_E[list(lowest(worth_E, max(2, layer.num_groups), layer.num_groups))] = 1
        found = {"dropped": dropped_E, "pruned_importance": worth_E * (1 - dropped_E)}
        found |= {"removal_loss": worth_E, "loss_curve": worth_E.sort().values.cumsum(0)}
        most, groups = layer.num_experts - layer.fewest_experts, layer.num_groups
        sets = [lowest(worth_E, min(x, most) // groups * groups, groups) for x in range(1, layer.num_experts + 1)]
        found |= {"best_sets": removed_mask(sets, layer.num_experts).double()}
        share_C = torch.linspace(
            0, 1, CANDIDATES, dtype=torch.float64
        )  # of its worth, for what stands in for an expert
        found |= {"candidate_error": worth_E[:, None] * share_C, "error_price": torch.tensor(0.5, dtype=torch.float64)}
        found |= {"candidate_loss": torch.full((CANDIDATES,), torch.inf, dtype=torch.float64)}
        in_first = {name: torch.zeros(len(statistics.domains), *x.shape, dtype=x.dtype) for name, x in found.items()}
        for name, value in found.items():
            in_first[name][0] = value
        layers[layer.name] = {**statistics.layers[layer.name], **in_first}
    return dataclasses.replace(statistics, layers=layers)


def with_sums(shape: ModelShape, **layers_by_name: list[object]) -> Statistics:
    """Statistics that are these very numbers: for every statistic, one value per layer."""
    layers = {
        layer.name: {
            name: torch.as_tensor(values[i], dtype=torch.float64).unsqueeze(0)
            for name, values in layers_by_name.items()
        }
        for i, layer in enumerate(shape.layers)
    }
    return Statistics(("all",), layers, Origin(shape), 1)


def restrict(statistics: Statistics, names: tuple[str, ...]) -> Statistics:
    """Only these statistics."""
    layers = {layer: {n: named[n] for n in dict.fromkeys(names)} for layer, named in statistics.layers.items()}
    return dataclasses.replace(statistics, layers=layers)


def relabel(statistics: Statistics, order: list[int]) -> Statistics:
    """The same model with its experts renumbered: new expert i is old expert order[i], in every layer."""
    layers = {}
    for layer, named in statistics.layers.items():
        layers[layer] = dict(named)
        for name in named:
            for axis, letter in enumerate(STATISTICS[name].axes, start=1):
                if letter == "E":
                    layers[layer][name] = layers[layer][name].index_select(axis, torch.tensor(order))
    return dataclasses.replace(statistics, layers=layers)


def layers_of(
    method: Method, statistics: Statistics | None, shape: ModelShape, amount: float, order: Sequence[int] | None = None
) -> list[LayerPlan]:
    """What a method plans for an amount; one that reads weights gets random ones, expert order[i] as expert i."""
    weights = random_weights(shape) if method.reads_weights else None
    if weights is not None and order is not None:
        weights = lambda layer: lambda e: random_weights(shape)(layer)(order[e])  # noqa: E731
    return method.plan(method.score_experts(statistics, shape, weights), shape, amount)


def random_weights(shape: ModelShape) -> Weights:
    """Experts of normal numbers, the same ones whenever they are read."""
    numbers = {layer.name: index for index, layer in enumerate(shape.layers)}

    def read(name: str, e: int) -> ExpertWeights:
        layer, generator = shape.layer(name), torch.Generator().manual_seed(1000 * numbers[name] + e)
        sides = [(layer.expert_width, layer.hidden_size)] * 2 + [(layer.hidden_size, layer.expert_width)]
        return ExpertWeights(*(torch.randn(*side, generator=generator) for side in sides))

    return lambda name: lambda e: read(name, e)


def tokens_of(ids_BS: Tensor) -> Tokens:
    """Blocks of ids as calibration data of one domain, every token of it text."""
    ones = torch.ones_like(ids_BS)
    return Tokens(
        ids_BS=ids_BS,
        loss_mask_BS=ones.bool(),
        attention_BS=ones,
        bytes_BS=ones,
        domain_B=torch.zeros(len(ids_BS), dtype=torch.int64),
        domains=("all",),
        weights=(1.0,),
        fingerprint="by hand",
        sources=({},),
        split="train",
        length=ids_BS.shape[1],
    )
