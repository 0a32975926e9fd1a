"""Skipping of experts that weigh little, with a threshold for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..experts.policies.skip import BESIDE, Skip
from ..options import option
from ..plans.plan import KEPT, LayerPlan
from ..shapes import ModelShape
from ..stats.shares import nearest, running
from ..stats.sums import Statistics
from . import Weights, method
from .fewer import AS_MODEL, RENORMALISE, check_mean, halfway, renormalises, tokens_of

READS = {"heaviest": "gate_ratio", "selected": "gate_share"}


@method("skip", paper="arXiv 2402.14800 (NAEE)", saves="active")
@dataclass(frozen=True)
class DynamicSkipping:
    """Skip those of a token's experts that weigh little beside its heaviest one, or beside all that it selected.

    runs_i = w_i >= threshold * R,  R the token's largest weight (`--beside heaviest`) or the sum of its K (`--beside selected`)

    Every layer has a threshold of its own, at which as many experts of a calibrated token run as are wanted on average. It saves
    active parameters and time, not memory.

    Needs:    gate_ratio or gate_share, and count; nothing where a threshold is given.
    Edges:    the heaviest expert always runs; a threshold of 0 skips none; the mean is met within a bin of 1 / 1024.
    Source:   dynamic skipping of NAEE, arXiv 2402.14800: there K = 2, and the threshold is the median of w_2 / w_1, which is the
              default here. Differs: any K, against the heaviest. Skipping by gate alone, as of ACE (arXiv 2609.05228), is
              `--beside selected`; its text was not at hand, so thresholds by a mean are ours.
    """

    threshold: float = option(
        None, "one for all layers; default: chosen for --mean-experts", at_least=0, at_most=1, kind=float
    )
    mean_experts: float = option(0.0, "experts of a token, on average; 0: halfway from one to all selected", at_least=0)
    beside: str = option("heaviest", "what an expert's weight is compared with", choices=BESIDE)
    renormalise: str = option("as-model", AS_MODEL, choices=RENORMALISE)

    def needs(self) -> tuple[str, ...]:
        return ("count", READS[self.beside]) if self.threshold is None else ()

    def score_experts(
        self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None
    ) -> list[tuple[float, float]]:
        """Threshold and mean number of experts of every layer; 0 where that is not known."""
        if self.threshold is not None:
            return [(float(self.threshold), 0.0)] * len(shape.layers)
        check_mean(self.mean_experts, shape)
        found = []
        for layer in shape.layers:
            seen = statistics.layer(layer.name)
            running_H = running(seen[READS[self.beside]][None], tokens_of(seen)[None], below=False)[0]
            threshold = nearest(running_H, self.mean_experts or halfway(layer))
            found.append((threshold, float(running_H[round(threshold * (len(running_H) - 1))])))
        return found

    def plan(self, scored: list[tuple[float, float]], shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(
                layer.name,
                (KEPT,) * layer.num_experts,
                routing=Skip(threshold, self.beside, renormalises(self.renormalise, layer), min(mean, layer.top_k)),
            )
            for layer, (threshold, mean) in zip(shape.layers, scored, strict=True)
        ]
