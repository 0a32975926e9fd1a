"""What methods share that take the lowest-scored experts of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.budget import BUDGETS, Limits, taken
from ..budgets.ranking import Ranking, ranking
from ..criteria import super_experts
from ..criteria.criterion import CRITERIA
from ..options import option
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights


@dataclass(frozen=True)
class Ranked:
    """Options that say which experts go: a criterion, a budget, and what holds whatever these say."""

    score: str = option("reap", "criterion by which experts are ranked; see locum list criteria")
    budget: str = option("uniform", "how many go from each layer; see locum list budgets")
    protect: bool = option(True, "keep Super Experts, which make massive activations, whatever their score")
    floor: int = option(0, "fewest experts that a layer keeps; never fewer than its router needs", at_least=0)
    multiple: int = option(1, "what the number of experts that a layer keeps is a multiple of", at_least=1)
    distinct: int = option(0, "most different numbers of experts that layers keep; 0: any", at_least=0)

    def needs(self) -> tuple[str, ...]:
        protecting = super_experts.NEEDS if self.protect else ()
        return (*CRITERIA[self.score].needs, *BUDGETS[self.budget].needs, *protecting)

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Ranking:
        return ranking(statistics, shape, self.score, self.protect, self.floor)

    def taken(self, scored: Ranking, shape: ModelShape, amount: float) -> list[set[int]]:
        """For every layer, the experts that go."""
        return taken(self.budget, scored, shape, amount, Limits(self.multiple, self.distinct))
