"""Criteria that read weights alone: no text, no router decision.

Letters: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("aimer", paper="arXiv 2603.18492 (AIMER)", needs=("weight_mass", "weight_square"))
def aimer(layer: LayerStatistics) -> Tensor:
    """How concentrated an expert's weights are: few large ones among many small ones are kept.

    S_e = rms(w) / mean |w|,  w all numbers of gate, up and down

    Units:    none; 1 for weights of one size, sqrt(pi / 2) = 1.25 for normal ones, more for heavier tails.
    Edges:    knows nothing of routing, so a never-routed expert can rank high; an expert of zeros gets 0.
    Differs:  the authors score the inverse, mean |w| / rms(w), and drop the highest; the order is the same. That an expert's
              matrices are taken as one is our reading.
    """
    shape = layer.shape
    numbers = shape.parameters() - shape.bias_parameters()
    rms_E, mean_E = (layer["weight_square"] / numbers).sqrt(), layer["weight_mass"] / numbers
    return torch.where(mean_E > 0, rms_E / torch.where(mean_E > 0, mean_E, 1.0), mean_E)


@criterion("ewn", paper="arXiv 2504.05586 (MC-Suite)", needs=("weight_square",), reverse="ewn_max")
def ewn(layer: LayerStatistics) -> Tensor:
    """Expert weight norm: experts with small weights go first.

    S_e = ||W_e||_2, over gate, up and down together

    Units:    weights.
    Edges:    knows nothing of routing.
    """
    return layer["weight_square"].sqrt()


@criterion("ews", paper="arXiv 2504.05586 (MC-Suite)", needs=("weight_product",), reverse="ews_max")
def ews(layer: LayerStatistics) -> Tensor:
    """Expert weight similarity: experts that are least like the others go first.

    S_e = 1 + 1 / (E - 1) sum_{i != e} cos(vec W_e, vec W_i)

    Units:    a mean cosine, plus one.
    Edges:    knows nothing of routing; hidden units are compared in the order in which they lie; an expert of zeros gets 0.
    Cost:     E*E numbers per layer.
    Differs:  the paper's sum of cosines without itself; a mean, plus one, has the same order and is not below 0.
    """
    return mean_cosine(layer["weight_product"])


@criterion("rwn", paper="arXiv 2504.05586 (MC-Suite)", needs=("router_norm",), reverse="rwn_max")
def rwn(layer: LayerStatistics) -> Tensor:
    """Router weight norm: experts whose row of the router is short go first.

    S_e = ||r_e||_2, r_e the row of the router for e

    Units:    weights.
    Edges:    knows nothing of routing.
    Differs:  the paper finds the reverse, `rwn_max`, the best of those that read weights.
    """
    return layer["router_norm"].clone()


@criterion("wsr", paper="arXiv 2504.05586 (MC-Suite)", needs=("stable_rank",), reverse="wsr_max")
def wsr(layer: LayerStatistics) -> Tensor:
    """Weight stable rank: experts whose weights have few directions go first.

    S_e = mean over gate, up, down of sum_i s_i^2 / s_1^2, s the singular values

    Units:    ranks.
    Edges:    knows nothing of routing.
    Cost:     singular values of every matrix.
    Differs:  the paper does not say how an expert's matrices are put together.
    """
    return layer["stable_rank"].clone()


def mean_cosine(product_EE: Tensor) -> Tensor:
    """[E] one plus the mean cosine of an expert with the others, from inner products of all pairs; 0 for one of zeros."""
    length_E = product_EE.diagonal().clamp(min=0).sqrt()
    scale_E = torch.where(length_E > 0, length_E, 1.0)
    cosine_EE = product_EE / (scale_E[:, None] * scale_E)
    others_E = cosine_EE.sum(dim=1) - cosine_EE.diagonal()
    return torch.where(length_E != 0, (1 + others_E / max(1, len(length_E) - 1)).clamp(min=0), length_E)
