"""REAM: the most salient experts each take in those that are most like them, and the rest stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ..budgets.counts import lowest, spare, uniform_counts
from ..budgets.groups import LIKENESS, merged
from ..budgets.ranking import layer_scores
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import DROPPED, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method

BOTH = ("outputs", "routing")


class Scores(NamedTuple):
    """What every layer's experts weigh, and how alike they are."""

    scores_LE: Sequence[Tensor]
    alike_LEE: Sequence[Tensor]


@method("ream", paper="arXiv 2604.04356 (REAM)")
@dataclass(frozen=True)
class REAM:
    """Merge the experts that REAP would prune into those that it keeps, the most salient first, few of them into many.

    1. Centroids are the experts with the highest scores, the same number in every layer.
    2. From the most salient on, each centroid takes the group_size - 1 experts most like it that nobody has, until all are taken:
       most centroids stay alone and unchanged ("pseudo-pruning").
    3. A group becomes one expert: sum_e S_e W_e / sum_e S_e, hidden units matched to its heaviest member's first.
    likeness(i, j) = 1/2 (mean over tokens of cos(f_i(x), f_j(x)) + mean over samples of the cosine of their router logits)

    The router loses the rows of all but the centroids, as in pruning; with `rows="kept"` all members' rows lead to their group's
    expert.

    Needs:    what the criterion needs; output_cosine, tokens, logit_cosine and samples (every expert runs on every token).
    Edges:    never below top-k and equal numbers per group for group-limited routers where rows go. Groups grow where group_size
              is too small for all to be taken. Never-routed experts are centroids last and weigh nothing.
    Source:   REAM, arXiv 2604.04356, and its code. Differs: calibration is of the original model, where the code computes each
              layer anew after those before it were merged; cosines of outputs are means over tokens, where the code takes mean
              outputs, weighed by gates; hidden units are matched by weights alone, where the code adds what they put out.
    """

    score: str = option("reap", "criterion by which experts are centroids and weigh")
    group_size: int = option(16, "most experts that become one, as long as that is enough", at_least=2)
    rows: str = option(
        "dropped", "what becomes of the router's rows of experts that are merged", choices=("dropped", "kept")
    )
    align: bool = option(True, "match hidden units to the heaviest member's before averaging")

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, *(need for name in BOTH for need in LIKENESS[name].needs))

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        alike = (sum(LIKENESS[name].of(layer) for name in BOTH) / len(BOTH) for layer in layers)
        return Scores(layer_scores(statistics, shape, self.score), tuple(alike))

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        dropping = self.rows == "dropped"
        most_L = [spare(layer) if dropping else layer.num_experts - 1 for layer in shape.layers]
        counts = uniform_counts(shape, amount, most_L)
        layers = zip(shape.layers, *scored, counts, strict=True)
        return [self._layer(*layer) for layer in layers]

    def _layer(self, layer: LayerShape, scores_E: Tensor, alike_EE: Tensor, count: int) -> LayerPlan:
        goes = lowest(scores_E, count, layer.num_groups)
        order = scores_E.sort(descending=True, stable=True).indices.tolist()
        centroids = [e for e in order if e not in goes]
        plan = merged(layer, pseudo_pruned(alike_EE, centroids, self.group_size), scores_E, self.align)
        if self.rows == "kept":
            return plan
        slots = tuple(slot if e in centroids else DROPPED for e, slot in enumerate(plan.slots))
        return replace(plan, slots=slots)


def pseudo_pruned(alike_EE: Tensor, centroids: Sequence[int], group_size: int) -> list[list[int]]:
    """A group for each centroid, in their order: the first takes those most like it, up to the size, and so on until all are taken.

    Ties go to the expert with the lower index.
    """
    left = [e for e in range(len(alike_EE)) if e not in centroids]
    size = max(group_size, math.ceil(len(alike_EE) / len(centroids)))
    groups = []
    for centroid in centroids:
        left.sort(key=lambda e: (-float(alike_EE[centroid, e]), e))
        groups.append([centroid, *left[: size - 1]])
        left = left[size - 1 :]
    return groups
