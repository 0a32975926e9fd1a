"""ConMoE: some experts are prototypes, and the router's other rows lead to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..budgets.groups import LIKENESS, aliased, groups_left, join_dominant
from ..budgets.ranking import layer_scores
from ..criteria.criterion import CRITERIA
from ..options import option
from ..plans.plan import LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


class Scores(NamedTuple):
    """What every layer's experts are chosen and remapped by."""

    scores_LE: Sequence[Tensor]
    alike_LEE: Sequence[Tensor]


@method("con-moe", paper="arXiv 2605.29350 (ConMoE)")
@dataclass(frozen=True)
class ConMoE:
    """Keep the experts with the highest scores as prototypes, and let every other slot of the router lead to the one most like it.

    y_e(x) = y_c(e)(x),  c(e) = argmax over prototypes c of likeness(e, c)

    No weight changes: a prototype is stored once, and all slots that lead to it are aliases. The router is untouched, so a
    token that selects an expert that is gone gets the prototype with that expert's gate. Every layer keeps the same share.

    Needs:    what the criterion needs, and what the likeness reads: logit_cosine and samples for routing, output_cosine and tokens
              for outputs (every expert runs on every token), weight_product for weights.
    Edges:    never-routed experts are prototypes last. Of equally alike prototypes the one with the higher score is taken. A token
              that selects two slots of one prototype has its output twice, each time with its own gate.
    Source:   ConMoE, arXiv 2605.29350, whose abstract alone could be read: prototypes, deterministic remapping and no weight
              change are its, criterion and likeness are ours. Left out: prototypes that nearby layers share, and its fusing of
              weights after remapping, which it found to depend on the model.
    """

    score: str = option("reap", "criterion by which experts are prototypes")
    alike: str = option("routing", "by what a slot is led to a prototype", choices=LIKENESS)

    def needs(self) -> tuple[str, ...]:
        return (*CRITERIA[self.score].needs, *LIKENESS[self.alike].needs)

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scores:
        alike = (LIKENESS[self.alike].of(statistics.layer(layer.name)) for layer in shape.layers)
        return Scores(layer_scores(statistics, shape, self.score), tuple(alike))

    def plan(self, scored: Scores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        plans = []
        for layer, scores_E, alike_EE in zip(shape.layers, *scored, strict=True):
            left = groups_left(layer, amount)
            order = scores_E.sort(descending=True, stable=True).indices.tolist()
            plans.append(aliased(layer, join_dominant(alike_EE, order[:left], order[left:])))
        return plans
