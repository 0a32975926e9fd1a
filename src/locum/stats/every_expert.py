"""Statistics of all experts on all tokens, whatever the router selects. They cost E / K times the experts' usual work.

Letters: T tokens, E experts, D model width, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .definitions import statistic
from .events import EveryExpertEvent


@statistic("output_cosine", axes="EE", event=EveryExpertEvent, on_demand=True)
def output_cosine(event: EveryExpertEvent) -> Tensor:
    """How alike the outputs of two experts are, on all tokens.

    sum_t cos(f_i(x_t), f_j(x_t))

    Needs:    the output of every expert for every token; collected on demand only.
    Shapes:   (E, E), symmetric.
    Units:    tokens (a cosine per token, -1 to 1).
    Edges:    an output of 0 has cosine 0 with all, itself included.
    Cost:     every expert runs on every token; E*E float64 per layer and domain.
    Source:   EAS of MC-Suite, arXiv 2504.05586.
    """
    length_TE = event.gram_TEE.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    scale_TE = torch.where(length_TE > 0, length_TE, 1.0)
    return (event.gram_TEE / (scale_TE[:, :, None] * scale_TE[:, None, :])).sum(dim=0)


@statistic("every_output_sum", axes="ED", event=EveryExpertEvent, on_demand=True)
def every_output_sum(event: EveryExpertEvent) -> Tensor:
    """The sum of an expert's outputs over all tokens, from which its mean output is made.

    sum_t f_e(x_t), over all tokens

    Needs:    the output of every expert for every token; collected on demand only.
    Shapes:   (E, D).
    Units:    hidden state; divide by `tokens` for the mean.
    Edges:    knows nothing of routing.
    Cost:     every expert runs on every token; E*D float64 per layer and domain.
    Source:   HC-SMoE, arXiv 2410.08589.
    """
    return event.out_TED.double().sum(dim=0)


@statistic("output_hsic", axes="EE", event=EveryExpertEvent, on_demand=True)
def output_hsic(event: EveryExpertEvent) -> Tensor:
    """How much the outputs of two experts depend on each other, for their CKA.

    sum over pieces of n tokens of n HSIC_1(K_i, K_j),  K_e = F_e F_e^T without its diagonal,
    HSIC_1(K, L) = [ tr(K L) + (1'K 1)(1'L 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1 ] / (n (n - 3))

    Needs:    the output of every expert for every token; collected on demand only.
    Shapes:   (E, E), symmetric.
    Units:    hidden state to the fourth power; only ratios mean something.
    Edges:    knows nothing of routing; pieces of fewer than 4 tokens say nothing. A little below 0 is chance.
    Cost:     every expert runs on every token; E*n*n*(D + E) for each piece, some 2^24 / (E D) tokens.
    Source:   linear CKA, arXiv 1905.00414, over pieces with the unbiased HSIC as in arXiv 2010.15327; DEK, arXiv 2407.09590.
    """
    out_ETD = event.out_TED.double().transpose(0, 1)
    num_experts, n, _ = out_ETD.shape
    if n < 4:
        return out_ETD.new_zeros(num_experts, num_experts)
    kernel_ETT = out_ETD @ out_ETD.mT
    kernel_ETT.diagonal(dim1=1, dim2=2).zero_()
    row_ET, flat = kernel_ETT.sum(dim=2), kernel_ETT.flatten(1)
    total_E = row_ET.sum(dim=1)
    together_EE = flat @ flat.T + total_E.outer(total_E) / ((n - 1) * (n - 2)) - 2 / (n - 2) * row_ET @ row_ET.T
    return together_EE / (n - 3)
