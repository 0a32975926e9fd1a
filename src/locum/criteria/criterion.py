"""Criteria: one number per expert of a layer. Each is one function beside its formula.

    @criterion("my_score", paper="arXiv NNNN.NNNNN (Name)", needs=("count", "output_norm"))
    def my_score(layer: LayerStatistics) -> Tensor: ...

is all it takes to add one: calibration then knows what to collect, and the conformance tests run over it. The decorator
says the name, the paper and the statistics. What holds for every criterion is said here, and nowhere else:

    Shapes    it returns (E,) float64, all finite.
    Order     higher means keep; equal values tie, and plans break ties by the lower index.
    Edges     a never-routed expert gets 0, the lowest value; a layer without tokens gets 0 everywhere.
    Units     values are comparable within a layer.
    Raises    StatisticsError where a needed statistic was not collected, or a value is not finite.
    Cost      its statistics; E numbers per layer and one pass over what they read.

A docstring has one sentence, the formula S_e = ..., its Units, and under Edges, Cost and Differs (from the paper) what is
special.

In the formulas: t is a token, e an expert, T_e the tokens that selected e, n_e = |T_e|, g_t,e the router weight that the
model multiplies the output with, f_e(x_t) the output before it. Letters: E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..registry import Registry
from ..stats.definitions import STATISTICS
from ..stats.sums import LayerStatistics


@dataclass(frozen=True)
class Criterion:
    """A named score. Calling it gives [E] float64, all finite; higher means keep."""

    name: str
    paper: str  # where its formula is from: "arXiv NNNN.NNNNN (Name)", or "no paper (why)"
    needs: tuple[str, ...]  # names of statistics
    score: Callable[[LayerStatistics], Tensor]

    def __call__(self, layer: LayerStatistics) -> Tensor:
        score_E = self.score(layer)
        if not bool(score_E.isfinite().all()):
            expert = int((~score_E.isfinite()).nonzero()[0])
            raise StatisticsError(
                f"criterion {self.name!r} gives {float(score_E[expert])} for expert {expert} of layer {layer.shape.name}; "
                f"the model's outputs on the calibration data were not finite: check the checkpoint, or calibrate in "
                f"bfloat16 or float32 instead of float16"
            )
        return score_E


CRITERIA: Registry[Criterion] = Registry("criterion", entry_points="locum.criteria")


def criterion(
    name: str, paper: str, needs: tuple[str, ...], reverse: str | None = None
) -> Callable[[Callable], Callable]:
    """Register the function below as a criterion, and the reverse of its order under a name of its own if one is given.

    Raises OptionError for a need that is not a statistic.
    """

    def register(score: Callable[[LayerStatistics], Tensor]) -> Callable[[LayerStatistics], Tensor]:
        known = tuple(STATISTICS[need].name for need in needs)
        CRITERIA.add(name, Criterion(name, paper, known, score))
        if reverse is not None:
            CRITERIA.add(reverse, Criterion(reverse, paper, known, _reversed(name, score)))
        return score

    return register


def _reversed(name: str, score: Callable[[LayerStatistics], Tensor]) -> Callable[[LayerStatistics], Tensor]:
    def turned(layer: LayerStatistics) -> Tensor:
        score_E = score(layer)
        there = score_E > 0
        if not bool(there.any()):
            return score_E
        ends = score_E[there].max() + score_E[there].min()
        return torch.where(score_E == 0, score_E, ends - score_E)

    turned.__doc__ = f"""The order of `{name}` turned round: the highest goes first.

    S_e = max + min - S'_e,  S' the score of `{name}`, max and min of those above 0

    Units:    those of `{name}`.
    Edges:    what has a score of 0 there, such as a never-routed expert, has it here too and goes first in both.
    Differs:  MC-Suite tries both directions of every criterion.
    """
    return turned
