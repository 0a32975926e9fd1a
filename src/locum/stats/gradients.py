"""Statistics of the loss's gradients. They need a backward pass, and the whole model in memory.

The loss is the sum of the cross entropies of all tokens that have loss.

Letters: E experts, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import each_expert
from .definitions import statistic
from .events import HiddenGradientEvent, Rows, WeightGradientEvent


@statistic("hidden_gradient_square", axes="EF", event=HiddenGradientEvent, on_demand=True)
def hidden_gradient_square(event: HiddenGradientEvent) -> Tensor:
    """The sum of squares of the loss's gradient by each number of an expert's hidden state.

    sum_{t routed to e} (dL / dh_t,c)^2 = W_down[:, c]^T (sum_t g_t g_t^T) W_down[:, c],  g_t = dL / df_e(x_t)

    Needs:    a backward pass; collected on demand only.
    Shapes:   (E, F).
    Units:    nats squared per hidden activation squared.
    Edges:    0 for a never-routed expert.
    Cost:     a backward pass of the model; E*F float64 per layer and domain.
    Source:   HEAPr, arXiv 2509.22299, whose quadratic form it is without the D*D matrix.
    """
    return each_expert(event.hidden_gradient_PF, event.counts, lambda x_QF: x_QF.square().sum(dim=0))


@statistic("gate_up_gradient", axes="EGD", event=WeightGradientEvent, on_demand=True, by_domain=False)
def gate_up_gradient(event: WeightGradientEvent) -> Rows:
    """The loss's gradient by an expert's first matrices, gate before up.

    dL / d(gate, up)

    Needs:    a backward pass; collected on demand only.
    Shapes:   (E, G, D).
    Units:    nats per weight.
    Edges:    0 for a never-routed expert.
    Cost:     a backward pass of the model; float64 as large as the weights, over all domains together.
    Source:   EGS, EGE, EGO and EGN of MC-Suite, arXiv 2504.05586.
    """
    rows, width = sum(matrix.shape[0] for matrix in event.experts[0][:-1]), event.experts[0][0].shape[1]
    return Rows((len(event.experts), rows, width), (torch.cat(matrices[:-1]).double() for matrices in event.experts))


@statistic("down_gradient", axes="EDF", event=WeightGradientEvent, on_demand=True, by_domain=False)
def down_gradient(event: WeightGradientEvent) -> Rows:
    """The loss's gradient by an expert's last matrix.

    dL / d(down)

    Needs:    a backward pass; collected on demand only.
    Shapes:   (E, D, F).
    Units:    nats per weight.
    Edges:    0 for a never-routed expert.
    Cost:     a backward pass of the model; float64 as large as the weights, over all domains together.
    Source:   EGS, EGE, EGO and EGN of MC-Suite, arXiv 2504.05586.
    """
    return Rows((len(event.experts), *event.experts[0][-1].shape), (m[-1].double() for m in event.experts))
