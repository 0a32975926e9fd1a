"""What methods share that merge clusters of experts: a tree by a distance of their own, cut to the same share in every layer."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..budgets.clusters import LINKAGES, Tree, tree
from ..budgets.groups import groups_left, merged
from ..budgets.ranking import layer_scores
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import LayerStatistics, Statistics
from . import Weights


class Scores(NamedTuple):
    """What every layer's experts weigh, and the order in which clusters of them join."""

    scores_LE: Sequence[Tensor]
    tree_L: Sequence[Tree]


@dataclass(frozen=True)
class Clustered(abc.ABC):
    """Options that say what members weigh and how clusters are joined. A method adds how far apart two experts are."""

    score: str = option("frequency", "criterion by which members weigh")
    linkage: str = option("average", "how far apart two clusters are, of all pairs of members", choices=LINKAGES)
    align: bool = option(True, "match hidden units to the heaviest member's before averaging")

    @abc.abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The statistics that distances read."""

    @abc.abstractmethod
    def distances(self, layer: LayerStatistics) -> Tensor:
        """[E, E] how far apart two experts of a layer are: symmetric, at least 0."""

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, *self.reads(), "count")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        trees = tuple(tree(self.distances(layer), layer["count"], self.linkage) for layer in layers)
        return Scores(layer_scores(statistics, shape, self.score), trees)

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            merged(layer, joined.groups(groups_left(layer, amount)), scores_E, self.align)
            for layer, scores_E, joined in zip(shape.layers, *scored, strict=True)
        ]
