"""DiEP: scores of experts within layers and of layers among each other are learnt together, by gradient descent.

Letters: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..budgets.budget import Limits, taken
from ..budgets.ranking import Ranking, protected
from ..criteria import super_experts
from ..options import option
from ..plans.plan import DROPPED, KEPT, LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method

RATE = 0.05  # of Adam


@method("diep", paper="arXiv 2509.16105 (DiEP)")
@dataclass(frozen=True)
class DiEP:
    """Drop the experts that get the smallest scores where all of them share a mass too small for all, whatever their layer.

    min over a, b: sum_l (1 - m_l)^T A_l (1 - m_l) / 1^T A_l 1,  m_l,e = mass alpha_l,e beta_l, alpha_l = E softmax(a_l),
    beta = L softmax(b), A_l,ij = sum over tokens routed to i and j of g_t,i g_t,j f_i(x_t) . f_j(x_t)

    The fraction is how much of a layer's routed output is missing where its experts' outputs are scaled by m: at first all by
    `mass`. Steps of Adam on a and on b take turns. Then the experts with the lowest m of the whole model go, so layers lose
    different numbers.

    Needs:    gated_output_product and count, and output_peak, by which Super Experts are found.
    Edges:    never below top-k; equal numbers per group for group-limited routers; Super Experts stay unless told not to.
              Never-routed experts have a score of 0 and go first; a layer without output has nothing to say and keeps beta near 1.
    Source:   DiEP, arXiv 2509.16105, of which abstract and summaries could be read: scores alpha within and beta between layers,
              learnt in turns by gradient descent on a small sample with a regulariser, unequal layers. Differs: what is
              reconstructed is every layer's own output, from sums, so that no pass of the model is needed; gates stay as they are; the
              fixed mass stands for the regulariser; its skipping of experts while a model runs is left out.
    """

    mass: float = option(0.5, "mean of all scores: how much of all experts there is to share", above=0, at_most=0.95)
    steps: int = option(200, "steps of gradient descent", at_least=1)
    protect: bool = option(True, "keep Super Experts, which make massive activations, whatever their score")
    floor: int = option(0, "fewest experts that a layer keeps; never fewer than its router needs", at_least=0)

    def needs(self) -> tuple[str, ...]:
        return ("gated_output_product", "count", *(super_experts.NEEDS if self.protect else ()))

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Ranking:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        share_LE = learnt([_relative(layer["gated_output_product"]) for layer in layers], self.mass, self.steps)
        scores_LE = [share_E * (layer["count"] > 0) for share_E, layer in zip(share_LE, layers, strict=True)]
        return protected(scores_LE, statistics, shape, self.protect, self.floor)

    def plan(self, scored: Ranking, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(layer.name, tuple(DROPPED if e in gone else KEPT for e in range(layer.num_experts)))
            for layer, gone in zip(shape.layers, taken("threshold", scored, shape, amount, Limits()), strict=True)
        ]


def _relative(product_EE: Tensor) -> Tensor:
    """[E, E] with a sum of 1: shares of the squares of a layer's output; 0 without any."""
    total = float(product_EE.sum())
    return product_EE / total if total > 1e-12 * float(product_EE.diagonal().sum()) else torch.zeros_like(product_EE)


def learnt(product_LEE: Sequence[Tensor], mass: float, steps: int) -> list[Tensor]:
    """[E] of every layer: the scales with that mean under which all layers together lose least of their output."""
    sizes = [len(product_EE) for product_EE in product_LEE]
    side_LEE = torch.stack([pad(x_EE, (0, max(sizes) - len(x_EE)) * 2) for x_EE in product_LEE])  # E: of the largest
    count_L1 = torch.tensor(sizes, dtype=torch.float64)[:, None]
    outside_LE = torch.arange(max(sizes)) >= count_L1
    a_LE = torch.zeros(outside_LE.shape, dtype=torch.float64, requires_grad=True)
    b_L1 = torch.zeros(count_L1.shape, dtype=torch.float64, requires_grad=True)

    def scales() -> Tensor:
        alpha_LE = count_L1 * a_LE.masked_fill(outside_LE, -torch.inf).softmax(1)
        return mass * len(sizes) * b_L1.softmax(0) * alpha_LE

    turns = [torch.optim.Adam([of], lr=RATE) for of in (a_LE, b_L1)]
    with torch.enable_grad():
        for step in range(2 * steps):
            missing_LE = 1 - scales()
            loss = (missing_LE * (side_LEE @ missing_LE[..., None])[..., 0]).sum()
            turns[step % 2].zero_grad()
            loss.backward()
            turns[step % 2].step()
    return [m_E[:size] for m_E, size in zip(scales().detach(), sizes, strict=True)]
