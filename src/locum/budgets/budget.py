"""Budgets: how many experts each layer gives up. Each is one function beside its rule, of what a method ranks experts by.

    @budget("my_budget", paper="arXiv NNNN.NNNNN (Name)", needs=("logit_norm",))
    def my_budget(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]: ...

What holds for every budget: it gives as many numbers as layers, each a multiple of the layer's groups, from 0 to what the
layer can lose; an amount of 0 gives none, of 1 (nearly) all that can go, and more amount never takes fewer together.

Letters: E experts, L layers, X numbers of experts that a layer may lose, from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from ..registry import Registry
from ..shapes import ModelShape
from ..stats.definitions import STATISTICS
from .allotment import cheapest, cheapest_of_few
from .counts import global_counts, lowest, prune_counts, uniform_counts
from .ranking import Ranking
from .selection import count_below, layer_thresholds

Counts = Callable[[Ranking, ModelShape, float], list[int]]


@dataclass(frozen=True)
class Budget:
    """A named budget."""

    name: str
    paper: str
    needs: tuple[str, ...]  # statistics beside those of the criterion
    counts: Counts


BUDGETS: Registry[Budget] = Registry("budget", entry_points="locum.budgets")


def budget(name: str, paper: str, needs: tuple[str, ...] = ()) -> Callable[[Counts], Counts]:
    """Register the function below as a budget."""

    def register(counts: Counts) -> Counts:
        BUDGETS.add(name, Budget(name, paper, tuple(STATISTICS[need].name for need in needs), counts))
        return counts

    return register


@budget("uniform", paper="arXiv 2510.13999 (REAP)")
def uniform(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]:
    """The same share of what each layer can lose: the only budget whose result a stock checkpoint can hold.

    n_l = floor(amount * most_l), a multiple of the layer's groups
    """
    return uniform_counts(shape, amount, ranking.most_L)


@budget("global", paper="arXiv 2507.00390 (MoNE)")
def global_(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]:
    """All experts of the model ranked together, by their share of their layer's score.

    The floor(amount * sum_l most_l) experts with the lowest S_e / sum_{i in layer} S_i
    """
    return global_counts(ranking.scores_LE, shape, amount, ranking.most_L)


@budget("threshold", paper="arXiv 2504.05586 (MC-Suite)")
def threshold(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]:
    """All experts of the model ranked together by the score itself, as if one threshold were laid over all layers.

    The floor(amount * sum_l most_l) experts with the lowest S_e

    Differs:  the paper finds that this makes bottleneck layers, because scores grow with depth; `global` divides by the
              layer's sum, and --floor keeps some of every layer.
    """
    return global_counts(ranking.scores_LE, shape, amount, ranking.most_L, of_layer=False)


@budget("importance", paper="arXiv 2411.01016 (MoE-I2)")
def importance(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]:
    """More from layers that matter less: inversely to the sum of their experts' scores.

    n_l proportional to 1 / sum_{i in layer} S_i, within what the layer can lose, by largest remainder
    """
    share = amount * sum(ranking.most_L) / sum(layer.num_experts for layer in shape.layers)
    return prune_counts(ranking.mass_L, shape, share, "inverse", ranking.most_L)


@budget("adaptive", paper="arXiv 2603.12645 (LightMoE)", needs=("logit_norm", "tokens"))
def adaptive(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]:
    """LightMoE's threshold: the shortest prefix of a layer, lowest first, whose share of the score exceeds it.

    threshold_l = clip(amount * exp(-0.3 (norm_l - 1)), 0.8 amount, 1.2 amount), norm_l the mean norm of a token's router
    logits over that of all layers
    """
    norms_L = [float(s["logit_norm"] / s["tokens"].clamp(min=1)) for s in ranking.statistics_L]
    thresholds = layer_thresholds(norms_L, amount, alpha=0.3, clip=0.2)
    found = []
    for scores_E, limit, most, layer in zip(ranking.scores_LE, thresholds, ranking.most_L, shape.layers, strict=True):
        free_E = scores_E[scores_E.isfinite()]
        below = count_below(free_E, limit) if amount > 0 and len(free_E) else 0
        found.append(min(below, most) // layer.num_groups * layer.num_groups)
    return found


@budget("measured", paper="no paper (a knapsack over measured losses)", needs=("loss_curve",))
def measured(ranking: Ranking, shape: ModelShape, amount: float) -> list[int]:
    """The counts whose losses, measured one layer at a time, have the smallest sum: exact, by dynamic programming.

    min sum_l loss_l(n_l) so that sum_l n_l >= floor(amount * sum_l most_l), loss_l(n) the increase of the model's loss
    without the n experts of layer l that are missed least alone

    Differs:  losses of layers are added up as if they did not meet.
    """
    return cheapest(_curves(ranking, shape), int(amount * sum(ranking.most_L) + 1e-9))


def _curves(ranking: Ranking, shape: ModelShape) -> list[np.ndarray]:
    curves = []
    for statistics, most, layer in zip(ranking.statistics_L, ranking.most_L, shape.layers, strict=True):
        cost_X = np.concatenate([[0.0], statistics["loss_curve"].numpy()[:most]])
        cost_X[np.arange(most + 1) % layer.num_groups != 0] = np.inf
        curves.append(cost_X)
    return curves


# --- limits on what any budget gives ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What serving engines ask of the numbers of experts that layers keep."""

    multiple: int = 1  # each is a multiple of this
    distinct: int = 0  # at most so many different ones; 0: any

    def counts(self, asked_L: list[int], ranking: Ranking, shape: ModelShape) -> list[int]:
        """The numbers to take that are nearest to those asked for (least squares), as many together or more if that can be.

        Raises OptionError where no number of a layer's experts is a multiple of what is asked.
        """
        if (self.multiple, self.distinct) == (1, 0) or not any(asked_L):
            return asked_L
        cost_LX = []
        for asked, most, layer in zip(asked_L, ranking.most_L, shape.layers, strict=True):
            taken = np.arange(most + 1)
            allowed = (taken % layer.num_groups == 0) & ((layer.num_experts - taken) % self.multiple == 0)
            if not allowed.any():
                raise OptionError(
                    f"--multiple is {self.multiple}, and {layer.name} keeps {layer.num_experts - most} to {layer.num_experts} "
                    f"experts; give a number of which there is a multiple among these"
                )
            cost_LX.append(np.where(allowed, (taken - asked) ** 2.0, np.inf))
        if not self.distinct:
            return cheapest(cost_LX, sum(asked_L))
        experts_L = [layer.num_experts for layer in shape.layers]
        return cheapest_of_few(cost_LX, experts_L, sum(asked_L), self.distinct)


def taken(name: str, ranking: Ranking, shape: ModelShape, amount: float, limits: Limits) -> list[set[int]]:
    """For every layer, the experts that go: those with the lowest scores, as many as the budget says."""
    counts = limits.counts(BUDGETS[name].counts(ranking, shape, amount), ranking, shape)
    layers = zip(ranking.scores_LE, counts, shape.layers, strict=True)
    return [set(lowest(scores_E, count, layer.num_groups)) for scores_E, count, layer in layers]
