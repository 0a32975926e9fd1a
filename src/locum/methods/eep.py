"""EEP: an evolutionary search over what goes from all layers together, by the model's loss.

Ranks that have met share what is tried.

Letters: E experts, X numbers of experts that go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ranks
from ..budgets.counts import spare
from ..budgets.sets import MOST_INDIVIDUALS, Experts, finite, removed_mask
from ..options import option
from ..plans.plan import Base, LayerPlan, stand_in
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Explorer, Weights, method
from .found_sets import FoundSets

Individual = tuple[Experts, ...]  # what goes from every layer
Mixtures = list[Tensor]  # [E, E] of every layer: row e is how much of each expert is in what takes the place of e
NOISE, SOME = 0.065, 2  # its spread, and how many numbers of a row get it on average: a quarter of eight in EEP's code


class Found(NamedTuple):
    """What the search found of every layer."""

    best_L: tuple[Tensor, ...]  # [X, E]
    mixed_L: tuple[Tensor, ...]  # [X, E, E], none without merging


@method("eep", paper="arXiv 2407.00945 (EEP)")
@dataclass(frozen=True)
class EEP(FoundSets):
    """Drop the experts without which the model as a whole does best, by an evolutionary search over all layers together.

    An individual says which x experts go from each layer; its fitness is the model's loss on the sample without them.
    1. For x = 1 the population is drawn at random; for every further x it is the best of x - 1 with one more from each layer.
    2. A child takes each layer from one of two good parents, and has one expert of one layer exchanged.
    3. After `generations` the best individual ever tried gives its layers' sets.
    4. With `mergings`, the weights of what stays become mixtures, W'_j = sum_i M_ji W_i. M begins as the best individual of 3, ones
       where an expert stays; a child takes each layer's M from one of two good parents, and one layer's rows get noise.
    One search serves any target up to `most`. Every layer gives the same share.

    Needs:    best_sets, and with `mergings` merge_weights, from a search.
    Edges:    never below top-k, equal numbers per group for group-limited routers. A streamed model is read once a generation,
              or more often where hidden states of all that is tried take more than 1 GiB; `mergings` are not tried on it.
    Source:   EEP, arXiv 2407.00945, and its code: both phases, pruning (1 to 3), in which router mapping and merging matrix are the
              same ones and zeros, and merging (4), whose noise is its code's. Differs: fitness is the loss on the text that is
              given, where the paper takes a task's accuracy; every layer is searched, where it ties layers in four groups;
              numbers of experts grow one by one; mixtures are never negative and sum to one. The router mapping stays ones and
              zeros: a mixture of router outputs has no form in a checkpoint here.
    """

    searched_with: ClassVar = ("most", "population", "generations", "mergings", "seed")

    most: float = option(0.5, "largest share of a layer's experts that goes", above=0, at_most=0.95)
    population: int = option(10, "individuals in a generation", at_least=4, at_most=MOST_INDIVIDUALS)
    generations: int = option(3, "generations for every number of experts", at_least=0)
    mergings: int = option(0, "generations of merging for every number of experts; 0: prune alone", at_least=0)
    seed: int = option(0, "seed of the search", at_least=0)

    def needs(self) -> tuple[str, ...]:
        return ("best_sets", "merge_weights") if self.mergings else ("best_sets",)

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """`best_sets` of every layer, and `merge_weights` where it merges. The model stays as it is."""
        layers, draw = explorer.shape.layers, Random(self.seed)
        found = {layer.name: torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64) for layer in layers}
        mixed = {
            name: torch.eye(len(best_XE), dtype=torch.float64).repeat(len(best_XE), 1, 1)
            for name, best_XE in found.items()
        }
        steps = max(self._rounds(layer) for layer in layers)
        good: list[Individual] = [tuple(() for _ in layers)]
        for step in range(1, steps + 1):
            growing = [step <= self._rounds(layer) for layer in layers]
            start = [self._grown(draw.choice(good), layers, growing, draw) for _ in range(self.population)]
            good = self._evolved(explorer, start, draw)
            for layer, members in zip(layers, good[0], strict=True):
                if members:
                    found[layer.name][len(members) - 1 :] = removed_mask([members], layer.num_experts).double()
            if self.mergings:
                self._mix(explorer, good[0], mixed, step)
            progress("numbers of experts", step, steps)
        if not self.mergings:
            return {name: {"best_sets": best_XE} for name, best_XE in found.items()}
        return {name: {"best_sets": best_XE, "merge_weights": mixed[name]} for name, best_XE in found.items()}

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Found:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        mixed_L = tuple(layer["merge_weights"] for layer in layers) if self.mergings else ()
        return Found(super().score_experts(statistics, shape), mixed_L)

    def plan(self, scored: Found, shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = super().plan(scored.best_L, shape, amount)
        return [_mixture(*layer) for layer in zip(plans, scored.mixed_L, strict=True)] if self.mergings else plans

    def _rounds(self, layer: LayerShape) -> int:
        """How often a layer can give one expert of every group."""
        return min(spare(layer), int(self.most * layer.num_experts + 1e-9)) // layer.num_groups

    def _grown(
        self, one: Individual, layers: Sequence[LayerShape], growing: Sequence[bool], draw: Random
    ) -> Individual:
        """An individual with one more expert of every group of each layer that can give more."""
        grown = []
        for members, layer, grows in zip(one, layers, growing, strict=True):
            more = [draw.choice([e for e in group if e not in members]) for group in _groups(layer)] if grows else []
            grown.append(tuple(sorted((*members, *more))))
        return tuple(grown)

    def _evolved(self, explorer: Explorer, start: Sequence[Individual], draw: Random) -> list[Individual]:
        """The best individuals ever tried, the best first. Of equals the first in lexicographic order."""
        layers, known = explorer.shape.layers, _tried(explorer, start)
        elites = max(2, self.population // 5)

        def best() -> list[Individual]:
            return sorted(known, key=lambda one: (known[one], one))[:elites]

        for _ in range(self.generations):
            parents = best()
            children = [self._child(draw.choice(parents), draw.choice(parents), layers, draw) for _ in start[elites:]]
            known |= _tried(explorer, [child for child in dict.fromkeys(children) if child not in known])
        return best()

    def _child(self, one: Individual, two: Individual, layers: Sequence[LayerShape], draw: Random) -> Individual:
        child = [draw.choice(pair) for pair in zip(one, two, strict=True)]
        index = draw.choice([i for i, members in enumerate(child) if members] or [0])
        if child[index]:
            gone = draw.choice(child[index])
            group = next(group for group in _groups(layers[index]) if gone in group)
            new = draw.choice([e for e in group if e not in child[index]])
            child[index] = tuple(sorted({*child[index], new} - {gone}))
        return tuple(child)

    def _mix(self, explorer: Explorer, best: Individual, mixed: Mapping[str, Tensor], step: int) -> None:
        """Step 4 for one number of experts: the best mixtures, written to their places in `mixed`."""
        layers, draw = explorer.shape.layers, torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        stays = [~removed_mask([members], layer.num_experts)[0] for members, layer in zip(best, layers, strict=True)]
        known: list[tuple[float, int, Mixtures]] = []

        def look(candidates: list[Mixtures]) -> None:
            for candidate, loss in zip(candidates, _tried_mixtures(explorer, candidates), strict=True):
                known.append((loss, len(known), candidate))
            known.sort(key=lambda one: one[:2])

        look([[stays_E.double().diag() for stays_E in stays]])
        elites = max(2, self.population // 5)
        for _ in range(self.mergings):
            parents = [one[2] for one in known[:elites]]
            look([_noisy(parents, stays, draw) for _ in range(self.population - elites)])
        for layer, members, mixed_EE in zip(layers, best, known[0][2], strict=True):
            if members:
                mixed[layer.name][len(members) - 1 :] = mixed_EE


def _noisy(parents: Sequence[Mixtures], stays: Sequence[Tensor], draw: torch.Generator) -> Mixtures:
    """Each layer's mixtures from one of two parents, and those of one layer with noise on some of their numbers."""
    pair = [parents[int(torch.randint(len(parents), (), generator=draw))] for _ in range(2)]
    child = [pair[int(torch.randint(2, (), generator=draw))][index] for index in range(len(stays))]
    index = int(torch.randint(len(child), (), generator=draw))
    weight_EE = child[index]
    noise_EE = NOISE * torch.randn(weight_EE.shape, generator=draw, dtype=torch.float64)
    noise_EE *= torch.rand(weight_EE.shape, generator=draw) < SOME / len(weight_EE)
    weight_EE = (weight_EE + noise_EE).clamp(min=0) * stays[index][:, None]
    sum_E1 = weight_EE.sum(dim=1, keepdim=True)
    child[index] = torch.where(
        sum_E1 > 0, weight_EE / torch.where(sum_E1 > 0, sum_E1, 1.0), stays[index].double().diag()
    )
    return child


def _tried_mixtures(explorer: Explorer, candidates: Sequence[Mixtures]) -> list[float]:
    """The loss of each. Ranks share them."""
    names = [layer.name for layer in explorer.shape.layers]
    return ranks.divide(candidates, lambda one: finite(explorer.loss_merged([dict(zip(names, one, strict=True))]))[0])


def _mixture(plan: LayerPlan, mixed_XEE: Tensor) -> LayerPlan:
    """A plan that drops experts, with the mixtures for that number of them in the places of those that stay."""
    gone = len(plan.slots) - len(plan.survivors)
    if not gone:
        return plan
    slots, bases = list(plan.slots), []
    for e in plan.survivors:
        members = mixed_XEE[gone - 1, e].nonzero().flatten().tolist()
        if members != [e]:
            slots[e] = stand_in(base=len(bases))
            bases.append(Base(tuple(members), tuple(mixed_XEE[gone - 1, e, members].tolist())))
    return replace(plan, slots=tuple(slots), bases=tuple(bases))


def _groups(layer: LayerShape) -> list[range]:
    size = layer.num_experts // layer.num_groups
    return [range(first, first + size) for first in range(0, layer.num_experts, size)]


def _tried(explorer: Explorer, individuals: Sequence[Individual]) -> dict[Individual, float]:
    """The loss of each. Ranks share them."""
    layers = explorer.shape.layers

    def masks_of(one: Individual) -> dict[str, Tensor]:
        pairs = zip(layers, one, strict=True)
        return {layer.name: removed_mask([members], layer.num_experts)[0] for layer, members in pairs}

    def losses_of(mine: list[Individual]) -> list[float]:
        return finite(explorer.loss_without([masks_of(one) for one in mine]))

    unique = list(dict.fromkeys(individuals))
    return dict(zip(unique, ranks.divide_lists(unique, losses_of), strict=True))
