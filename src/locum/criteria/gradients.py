"""Criteria of MC-Suite that read the gradients of the loss by experts' weights.

Letters: E experts, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion
from .of_weights import mean_cosine
from .variance import geometric_mean

NEEDS = ("gate_up_gradient", "down_gradient")
PAPER = "arXiv 2504.05586 (MC-Suite)"


def _by_dimension(layer: LayerStatistics) -> Tensor:
    """[E, G + F, D] all gradients of every expert, the last axis that of the model's dimensions."""
    return torch.cat([layer["gate_up_gradient"], layer["down_gradient"].transpose(1, 2)], dim=1)


@criterion("egn", paper=PAPER, needs=NEEDS, reverse="egn_max")
def egn(layer: LayerStatistics) -> Tensor:
    """Expert gradient norm: experts whose weights the loss hardly asks to change go first.

    S_e = ||G_e||_2,  G_e = dL / dW_e, over gate, up and down together

    Units:    nats per weight.
    Cost:     a backward pass, and numbers as many as weights.
    """
    return torch.linalg.vector_norm(_by_dimension(layer), dim=(1, 2))


@criterion("egs", paper=PAPER, needs=NEEDS, reverse="egs_max")
def egs(layer: LayerStatistics) -> Tensor:
    """Expert gradient similarity: experts whose gradients are least like those of the others go first.

    S_e = 1 + 1 / (E - 1) sum_{i != e} cos(vec G_e, vec G_i),  G_e = dL / dW_e

    Units:    a mean cosine, plus one.
    Edges:    hidden units are compared in the order in which they lie.
    Cost:     a backward pass, and numbers as many as weights.
    Differs:  the paper's sum of cosines without itself; a mean, plus one, has the same order and is not below 0.
    """
    flat = _by_dimension(layer).flatten(1)
    return mean_cosine(flat @ flat.T)


@criterion("ege", paper=PAPER, needs=NEEDS, reverse="ege_max")
def ege(layer: LayerStatistics) -> Tensor:
    """Expert gradient entropy: experts whose gradients vary little go first.

    S_e = exp( 1/D sum_d log std(G_e[:, d]) ),  G_e = dL / dW_e with a column for each dimension of the model, std unbiased

    Units:    nats per weight: the geometric mean of the standard deviations.
    Cost:     a backward pass, and numbers as many as weights.
    Differs:  the paper's second best. It does not say which axis is a dimension; the sum of logarithms has the same order as
              this, which is not below 0.
    """
    return geometric_mean(_by_dimension(layer).std(dim=1))


@criterion("ego", paper=PAPER, needs=NEEDS, reverse="ego_max")
def ego(layer: LayerStatistics) -> Tensor:
    """Expert gradient outliers: experts with few extreme gradients go first.

    S_e = number of entries of G_e outside of mean +- 3 std of G_e,  G_e = dL / dW_e

    Units:    entries.
    Edges:    ties are common where matrices are small.
    Cost:     a backward pass, and numbers as many as weights.
    """
    flat = _by_dimension(layer).flatten(1)
    far = (flat - flat.mean(dim=1, keepdim=True)).abs() > 3 * flat.std(dim=1, keepdim=True)
    return torch.where(flat.isnan().any(dim=1), torch.nan, far.sum(dim=1).double())
