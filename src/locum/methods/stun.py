"""STUN's first stage: experts that the router treats alike are clusters, and of each one expert stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..budgets.clusters import Tree, tree
from ..budgets.counts import spare
from ..budgets.groups import aliased
from ..options import option
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import LayerStatistics, Statistics
from . import Weights, method


class Scores(NamedTuple):
    """In which order every layer's experts join, how near their weights are, and how often each was selected."""

    tree_L: Sequence[Tree]
    product_LEE: Sequence[Tensor]
    count_LE: Sequence[Tensor]


@method("stun", paper="arXiv 2409.06211 (STUN)", published={"together": 0.0})
@dataclass(frozen=True)
class STUN:
    """Join a layer's experts whose router rows are near, under one threshold for all layers, and keep of each cluster one expert.

    d(i, j) = `apart` ||R_i - R_j|| / ||R|| - `together` n_ij / sum over pairs of n,  R the router's matrix, n_ij the tokens that
    selected both

    1. Clusters join while the members that are farthest apart are nearer than a threshold (complete linkage); one threshold
       for all layers, so that those with more alike experts lose more.
    2. Of a cluster the expert stays whose weights are nearest to its members' mean, of two, which are equally near, the one that
       more tokens selected (without `together` the one with larger weights); the others are dropped with their rows.

    Needs:    router_product and weight_product, of weights alone, and with `together` co_count and count.
    Edges:    never below top-k. A group-limited router, and one that refuses dropping, keeps all rows: those of the experts that are
              gone lead to the one that stays. With `together`, experts that were never selected join first
              and do not stay.
    Source:   STUN, arXiv 2409.06211, and its code; the first of its two stages: sparsity inside of the experts that stay is not
              here. Differs: of two experts its code
              keeps the first; co-activation counts by default (the code's released setting leaves it out: `--preset paper`); where
              few clusters are left the code may average members, here one always stays.
    """

    apart: float = option(1.0, "how much the distance of router rows counts", at_least=0)
    together: float = option(1.0, "how much it counts that tokens select both; 0 reads no text", at_least=0)

    def needs(self) -> tuple[str, ...]:
        return ("router_product", "weight_product", *(("co_count", "count") if self.together else ()))

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        count_LE = tuple(layer["count"] if self.together else torch.ones(layer.shape.num_experts) for layer in layers)
        trees = tuple(self._tree(layer, count_E) for layer, count_E in zip(layers, count_LE, strict=True))
        return Scores(trees, tuple(layer["weight_product"] for layer in layers), count_LE)

    def _tree(self, layer: LayerStatistics, count_E: Tensor) -> Tree:
        square_E = layer["router_product"].diagonal()
        far_EE = (square_E[:, None] + square_E[None, :] - 2 * layer["router_product"]).clamp(min=0).sqrt()
        far_EE = self.apart * far_EE / square_E.sum().sqrt().clamp(min=1e-300)
        if not self.together:
            return tree(far_EE, count_E, "complete")
        both_EE = layer["co_count"] - layer["co_count"].diagonal().diag()
        far_EE = far_EE - self.together * both_EE / both_EE.sum().clamp(min=1)
        return tree(far_EE - far_EE.min(), count_E, "complete")

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        rows_go = [layer.num_groups == 1 and not layer.refuse_dropping for layer in shape.layers]
        most_L = [spare(x) if goes else x.num_experts - 1 for x, goes in zip(shape.layers, rows_go, strict=True)]
        counts = _under_one_threshold(scored.tree_L, most_L, amount)
        layers = zip(shape.layers, *scored, counts, rows_go, strict=True)
        return [_layer(*layer) for layer in layers]


def _under_one_threshold(trees: Sequence[Tree], most_L: Sequence[int], amount: float) -> list[int]:
    """How many joins of every layer are among the nearest of all layers together."""
    heights = [[-1.0] * len(joined.idle) + joined.joins[:, 2].tolist() for joined in trees]
    all_joins = sorted(
        (height, index)
        for index, (of_layer, most) in enumerate(zip(heights, most_L, strict=True))
        for height in of_layer[:most]
    )
    taken = [index for _, index in all_joins[: int(amount * sum(most_L) + 1e-9)]]
    return [taken.count(index) for index in range(len(trees))]


def _layer(
    layer: LayerShape, joined: Tree, product_EE: Tensor, count_E: Tensor, count: int, rows_go: bool
) -> LayerPlan:
    groups = joined.groups(layer.num_experts - count)
    stay = [_stays(product_EE, count_E, group) for group in groups]
    if rows_go:
        return LayerPlan(layer.name, tuple(KEPT if e in stay else DROPPED for e in range(layer.num_experts)))
    return aliased(layer, [[e, *(m for m in group if m != e)] for e, group in zip(stay, groups, strict=True)])


def _stays(product_EE: Tensor, count_E: Tensor, group: Sequence[int]) -> int:
    """The member nearest to the mean: ||W_e - mean||^2 is W_e.W_e - 2 W_e.mean, but for what all members have alike."""
    size = float(product_EE.diagonal().mean().clamp(min=1e-300))

    def key(e: int) -> tuple[bool, float, float, float]:
        far = float(product_EE[e, e] - 2 * product_EE[e, list(group)].mean()) / size
        return (not count_E[e], round(far, 9), -float(count_E[e]), -float(product_EE[e, e]))

    return min(group, key=key)
