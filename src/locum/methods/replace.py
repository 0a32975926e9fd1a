"""Replace: LightMoE's baselines, an adapter in an expert's place with or without one shared base."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.selection import SELECTIONS, SelectionScores, mass_weights, select, selection_scores
from ..criteria.criterion import CRITERIA
from ..experts.parts.low_rank import STARTS
from ..options import option
from ..plans.plan import KEPT, Base, LayerPlan, stand_in
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("replace", paper="arXiv 2603.12645 (LightMoE)", published={"start": "paper"})
@dataclass(frozen=True)
class Replace:
    """Put a rank-r adapter in place of each less important expert, over one shared base per layer or over nothing.

    With `shared`, W = base + B A with one gate-weighted base; without, W = B A. There is no annealing in the paper's
    baseline. With `shared=False`, `score="reap"` and `selection="average"` it is the SVD of the weakest experts alone.

    Needs:    as LightMoE's selection; input_gram and hidden_gram for whitened starts.
    Edges:    a layer in which nothing would be saved stays whole.
    Source:   "Replace (w. shared)" and "(w/o shared)" of LightMoE, arXiv 2603.12645, sections 1 and 4.1. Differs: the
              paper states neither their selection rule nor how adapters start; they get LightMoE's selection, and start
              whitened. `--preset paper` starts them at B = 0 over a base and from the SVD without, because with B = 0 and
              no base every gradient is exactly zero.
    """

    shared: bool = option(True, "one shared base per layer under the adapters")
    selection: str = option("adaptive", "how many experts each layer gives up", choices=SELECTIONS)
    score: str = option("gate", "criterion by which experts are ranked")
    alpha: float = option(0.3, "how strongly large router outputs protect a layer", at_least=0, at_most=100)
    clip: float = option(0.2, "largest relative deviation of a layer's threshold", at_least=0)
    rank: int = option(16, "rank of every replaced expert's adapter", at_least=1)
    start: str = option(
        "whitened", "where adapters start; paper: svd without, gaussian with a base", choices=("paper", *STARTS)
    )

    def needs(self) -> tuple[str, ...]:
        return (
            *CRITERIA[self.score].needs,
            "logit_norm",
            "tokens",
            *(STARTS[self.start].needs if self.start in STARTS else ()),
        )

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> SelectionScores:
        return selection_scores(statistics, shape, self.score)

    def plan(self, scored: SelectionScores, shape: ModelShape, amount: float) -> list[LayerPlan]:
        how = {"selection": self.selection, "alpha": self.alpha, "clip": self.clip}
        selected = select(scored, shape, amount, **how)
        start = self.start if self.start != "paper" else "gaussian" if self.shared else "svd"
        plans = []
        for layer, candidates, scores_E in zip(shape.layers, selected, scored.scores_LE, strict=True):
            rank = min(self.rank, layer.hidden_size, layer.expert_width)
            slot = stand_in(base=0 if self.shared else None, rank=rank, start=start)
            chosen = sorted(candidates)
            slots = tuple(slot if e in chosen else KEPT for e in range(layer.num_experts))
            bases = (Base(tuple(chosen), mass_weights(scores_E, chosen)),) if self.shared and chosen else ()
            plan = LayerPlan(layer.name, slots, bases)
            whole = LayerPlan(layer.name, (KEPT,) * layer.num_experts)
            plans.append(plan if plan.parameters(layer) < whole.parameters(layer) else whole)
        return plans
