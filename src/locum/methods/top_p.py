"""Top-p: for every token as many experts as it takes to exceed a share of its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..experts.policies.top_p import MOST, SHARES, TopP
from ..options import option
from ..plans.plan import KEPT, LayerPlan
from ..shapes import ModelShape
from ..stats.shares import nearest, running
from ..stats.sums import Statistics
from . import Weights, method
from .fewer import AS_MODEL, RENORMALISE, check_mean, halfway, renormalises, tokens_of

READS = {"selected": "prefix_share", "all": "prefix_gate"}


@method("top-p", paper="arXiv 2403.07652 (Harder Tasks Need More Experts)", saves="active")
@dataclass(frozen=True)
class DynamicTopP:
    """Run only as many of the experts that the router selects as it takes for their weights to exceed p.

    S = the smallest prefix of a token's experts, heaviest first, with  sum over S of w_i > p W;  all K where there is none

    W is the sum of the K weights (`--of selected`), or 1, the probability of all experts (`--of all`, for routers that do not
    renormalise). One p serves all layers, and is chosen for a mean number of experts over layers and calibrated tokens. It saves
    active parameters and time, not memory.

    Needs:    prefix_share or prefix_gate, and count; nothing where p is given.
    Edges:    p = 0 runs one expert, p of 1 or more all K; the mean is met within a bin of 1 / 1024.
    Source:   dynamic routing, arXiv 2403.07652. Differs: it trains with p = 0.4 of all experts; here top-k is the cap, and by
              default weights are scaled where the model's own router makes them sum to one.
    """

    p: float = option(
        None, "share that must be exceeded; default: chosen for --mean-experts", at_least=0, at_most=MOST, kind=float
    )
    mean_experts: float = option(0.0, "experts of a token, on average; 0: halfway from one to all selected", at_least=0)
    of: str = option("selected", "p is a share of these experts' weights", choices=SHARES)
    renormalise: str = option("as-model", AS_MODEL, choices=RENORMALISE)

    def needs(self) -> tuple[str, ...]:
        return ("count", READS[self.of]) if self.p is None else ()

    def score_experts(
        self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None
    ) -> list[tuple[float, float]]:
        """p and the mean number of experts of every layer; 0 where that is not known."""
        if self.p is not None:
            return [(float(self.p), 0.0)] * len(shape.layers)
        check_mean(self.mean_experts, shape)
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        tokens_L = torch.stack([tokens_of(layer) for layer in layers])
        running_LH = running(torch.stack([layer[READS[self.of]] for layer in layers]), tokens_L, below=True)
        wanted = self.mean_experts or sum(map(halfway, shape.layers)) / len(layers)
        p = nearest(running_LH.mean(dim=0), wanted)
        return [(p, float(mean)) for mean in running_LH[:, round(p * (running_LH.shape[1] - 1))]]

    def plan(self, scored: list[tuple[float, float]], shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(
                layer.name,
                (KEPT,) * layer.num_experts,
                routing=TopP(p, self.of, renormalises(self.renormalise, layer), min(mean, layer.top_k)),
            )
            for layer, (p, mean) in zip(shape.layers, scored, strict=True)
        ]
