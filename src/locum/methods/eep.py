"""EEP: an evolutionary search over what goes from all layers together, by the model's loss.

Ranks that have met share what is tried.

Letters: E experts, X numbers of experts that go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..budgets.counts import spare
from ..budgets.sets import Experts, finite, removed_mask
from ..options import option
from ..shapes import LayerShape
from . import Explorer, method
from .found_sets import FoundSets

Individual = tuple[Experts, ...]  # what goes from every layer


@method("eep", paper="arXiv 2407.00945 (EEP)")
@dataclass(frozen=True)
class EEP(FoundSets):
    """Drop the experts without which the model as a whole does best, by an evolutionary search over all layers together.

    An individual says which x experts go from each layer; its fitness is the model's loss on the sample without them.
    1. For x = 1 the population is drawn at random; for every further x it is the best of x - 1 with one more from each layer.
    2. A child takes each layer from one of two good parents, and has one expert of one layer exchanged.
    3. After `generations` the best individual ever tried gives its layers' sets.
    One search serves any target up to `most`. Every layer gives the same share.

    Needs:    best_sets, from a search.
    Edges:    never below top-k, equal numbers per group for group-limited routers. A streamed model is read once a generation, or more often
              where hidden states of all that is tried take more than 1 GiB.
    Source:   EEP, arXiv 2407.00945, and its code; its first phase, pruning, in which router mapping and merging matrix are the
              same ones and zeros. Differs: fitness is the loss on the text that is given, where the paper takes a task's accuracy;
              every layer is searched, where it ties layers in four groups; numbers of experts grow one by one. Its second phase,
              continuous matrices over experts and router outputs, is left out: merged routers have no form in a checkpoint here.
    """

    searched_with: ClassVar = ("most", "population", "generations", "seed")

    most: float = option(0.5, "largest share of a layer's experts that goes", above=0, at_most=0.95)
    population: int = option(10, "individuals in a generation", at_least=4)
    generations: int = option(3, "generations for every number of experts", at_least=0)
    seed: int = option(0, "seed of the search", at_least=0)

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """`best_sets` of every layer. The model stays as it is."""
        layers, draw = explorer.shape.layers, Random(self.seed)
        found = {layer.name: torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64) for layer in layers}
        steps = max(self._rounds(layer) for layer in layers)
        good: list[Individual] = [tuple(() for _ in layers)]
        for step in range(1, steps + 1):
            growing = [step <= self._rounds(layer) for layer in layers]
            start = [self._grown(draw.choice(good), layers, growing, draw) for _ in range(self.population)]
            good = self._evolved(explorer, start, draw)
            for layer, members in zip(layers, good[0], strict=True):
                if members:
                    found[layer.name][len(members) - 1 :] = removed_mask([members], layer.num_experts).double()
            progress("numbers of experts", step, steps)
        return {name: {"best_sets": best_XE} for name, best_XE in found.items()}

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
