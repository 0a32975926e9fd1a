"""MoE-I2: a search finds the experts that are missed least together; the others become low-rank.

Layers, and blocks of them, are searched apart: ranks that have met share them.

Letters: C candidates, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..budgets.counts import COUNTS, prune_counts
from ..budgets.sets import MOST_INDIVIDUALS, Experts, choose_in_block, finite, removed_mask, search_sets
from ..experts.parts.low_rank import STARTS
from ..options import option
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Explorer, Weights, method
from .decompose import LowRank

IMPORTANCE = ("output", "loss")


@dataclass(frozen=True, eq=False)
class Found:
    """What the search found of every layer."""

    left_L: Sequence[list[int]]  # the experts that it did not drop
    importance_L: Sequence[Tensor]  # what each of these is worth; all alike where nobody asks


@method("moe-i2", paper="arXiv 2411.01016 (MoE-I2)", published={"start": "svd"})
@dataclass(frozen=True)
class MoEI2(LowRank):
    """Prune the experts that a search misses least, then decompose the others, with more rank for what matters more.

    1. Importance: the error of removing one expert, everything else intact; a layer's is the sum of its experts'.
    2. Counts: `pruned` of all experts go, fewer where the layer matters more (`counts`).
    3. Sets: a genetic search per layer keeps the `candidates` sets with the lowest error of the layer's output; then of
       each `block` of consecutive layers the combination whose error after the block's last decoder layer is lowest.
    4. Ranks: as in `decompose`, by importances taken anew on the pruned model.
    All but the ranks is the search (`locum search`); a plan then drops what it found, and ranks fall with the amount.

    `importance="output"` is the error of the layer's own output on cached tokens, ||F(X) - F_without(X)||_F with the
    router run anew; "loss" is the increase of the model's loss, not below 0. The paper's L can be read as either.
    Output is the default: it costs one pass and then only routing, where loss costs one pass of the model for each
    expert; it is what the public re-implementation takes; and it is never 0 for an expert that a token uses, while
    differences of losses on little data are mostly noise.

    Needs:    dropped and pruned_importance, from a search; input_gram and hidden_gram for whitened factors.
    Edges:    never below top-k, equal numbers per group for group-limited routers, nothing where dropping is refused.
              Layers that cannot spare an expert have no importance to measure: they count as 0, their experts alike.
              The least that can be removed is what the search dropped; a target below is refused.
    Source:   MoE-I2, arXiv 2411.01016, as far as it could be read: formulas from summaries, counts ("inverse"), elites and
              mutation from a public re-implementation for Qwen3-MoE. Differs: blocks are real decoder layers, each from
              the original model's input; sets are all tried where that costs no more than the search.
    """

    searched_with: ClassVar = (
        "pruned",
        "importance",
        "counts",
        "population",
        "generations",
        "candidates",
        "block",
        "seed",
    )

    pruned: float = option(0.25, "share of all experts that the search drops", at_least=0, at_most=0.95)
    importance: str = option("output", "error that says what an expert is worth", choices=IMPORTANCE)
    counts: str = option("inverse", "how many experts each layer gives up, by its importance", choices=COUNTS)
    population: int = option(100, "sets of experts in a generation of the search", at_least=4, at_most=MOST_INDIVIDUALS)
    generations: int = option(50, "generations of the search", at_least=0)
    candidates: int = option(3, "best sets of each layer that are tried together", at_least=1, at_most=10)
    block: int = option(3, "consecutive layers in which they are tried together", at_least=1, at_most=6)
    seed: int = option(0, "seed of the search", at_least=0)
    decompose: bool = option(True, "make the experts that stay low-rank; without, the plan prunes only")

    def needs(self) -> tuple[str, ...]:
        ranks = ("pruned_importance", *STARTS[self.start].needs) if self.decompose else ()
        return ("dropped", *ranks)

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """Steps 1 to 4 on a live model: `dropped` and `pruned_importance` of every layer. The model ends up pruned."""
        layers = explorer.shape.layers
        nothing = {layer.name: () for layer in layers}
        first = self._importance(explorer, nothing, lambda done: progress("importance", done, len(layers)))
        totals = [float(importance_E.sum()) for importance_E in first.values()]
        counts = prune_counts(totals, explorer.shape, self.pruned, self.counts)

        def sets_of(index: int) -> list[Experts]:
            sets = self._search(explorer, layers[index], counts[index], self.seed * 1_000_003 + index)
            progress("search", index + 1, len(layers))
            return sets

        found = ranks.divide(range(len(layers)), sets_of)

        def best_in_block(start: int) -> dict[str, Experts]:
            block = slice(start, start + self.block)
            sizes = {layer.name: layer.num_experts for layer in layers[block]}
            best = choose_in_block(dict(zip(sizes, found[block], strict=True)), sizes, explorer.block_error)
            progress("blocks", start + len(sizes), len(layers))
            return best

        dropped: dict[str, Experts] = {}
        for best in ranks.divide(range(0, len(layers), self.block), best_in_block):
            dropped |= best
        masks = {layer.name: removed_mask([dropped[layer.name]], layer.num_experts)[0] for layer in layers}
        explorer.prune(masks)
        last = self._importance(explorer, dropped, lambda done: progress("importance anew", done, len(layers)))
        return {name: {"dropped": masks[name].double(), "pruned_importance": last[name]} for name in last}

    def _importance(
        self, explorer: Explorer, gone: Mapping[str, Experts], progress: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """[E] float64 per layer: the error of removing each expert alone; 0 for those that are gone."""
        error = {"output": explorer.output_error, "loss": explorer.loss_increase}[self.importance]
        layers = explorer.shape.layers

        def of_layer(index: int) -> Tensor:
            layer = layers[index]
            left = [e for e in range(layer.num_experts) if e not in gone[layer.name]]
            importance_E = torch.zeros(layer.num_experts, dtype=torch.float64)
            if len(left) > layer.fewest_experts:
                masks_CE = removed_mask([(e,) for e in left], layer.num_experts)
                error_C = finite(error(layer.name, masks_CE))
                importance_E[left] = torch.tensor(error_C, dtype=torch.float64).clamp(min=0)
            progress(index + 1)
            return importance_E

        return dict(zip((x.name for x in layers), ranks.divide(range(len(layers)), of_layer), strict=True))

    def _search(self, explorer: Explorer, layer: LayerShape, count: int, seed: int) -> list[Experts]:
        if not count:
            return [()]
        sets = search_sets(
            layer.num_experts,
            count,
            lambda removed_CE: explorer.output_error(layer.name, removed_CE),
            population=self.population,
            generations=self.generations,
            keep=self.candidates,
            num_groups=layer.num_groups,
            seed=seed,
        )
        return [members for members, _ in sets]

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Found:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        left_L = [(layer["dropped"] == 0).nonzero().flatten().tolist() for layer in layers]
        if not self.decompose:
            return Found(left_L, [torch.ones(len(left)) for left in left_L])
        return Found(left_L, [layer["pruned_importance"][left] for layer, left in zip(layers, left_L, strict=True)])

    def plan(self, scored: Found, shape: ModelShape, amount: float) -> list[LayerPlan]:
        layers = zip(shape.layers, scored.left_L, scored.importance_L, strict=True)
        return [self._layer(*layer, amount) for layer in layers]

    def _layer(self, shape: LayerShape, left: list[int], importance_E: Tensor, amount: float) -> LayerPlan:
        if amount == 0:
            return LayerPlan(shape.name, (KEPT,) * shape.num_experts)
        slots = self.low_rank_slots(importance_E, shape, amount) if self.decompose else [KEPT] * len(left)
        stays = dict(zip(left, slots, strict=True))
        return LayerPlan(shape.name, tuple(stays.get(e, DROPPED) for e in range(shape.num_experts)))
