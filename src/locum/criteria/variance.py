"""Criteria that read how much an expert's output varies."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics, output_variance
from .criterion import criterion


@criterion(
    "eae",
    paper="arXiv 2504.05586 (MC-Suite)",
    needs=("count", "output_square", "output_sum"),
    reverse="eae_max",
)
def eae(layer: LayerStatistics) -> Tensor:
    """Expert activation entropy: experts whose outputs vary little in every dimension go first.

    S_e = exp( 1/D sum_d log std_{t in T_e} f_e(x_t)_d ), std unbiased

    Units:    hidden-state value: the geometric mean of the standard deviations.
    Edges:    an expert with a single token, or with one dimension that never changes, gets 0 and ties with a never-routed one.
    Cost:     2E*D numbers per layer.
    Differs:  the paper's sum of logarithms has the same order; this is not below 0.
    """
    return geometric_mean(output_variance(layer).sqrt())


@criterion(
    "mone",
    paper="arXiv 2507.00390 (MoNE)",
    needs=("count", "gate_sum", "output_square", "output_sum", "tokens"),
)
def mone(layer: LayerStatistics) -> Tensor:
    """How badly a constant would stand in for an expert: its router weight times the spread of its outputs.

    S_e = (G_e / T) || sqrt( Var_{t in T_e} f_e(x_t) ) ||_2,  G_e = sum_{t in T_e} g_t,e, T all tokens, Var unbiased

    Units:    hidden-state L2 norm. A low value marks an expert that its mean output replaces well.
    Edges:    an expert with a single token and one whose output is constant get 0 too, and tie with a never-routed one.
    Cost:     2E*D numbers per layer, two passes over expert outputs.
    Differs:  the paper's redundancy is phi_var * phi_freq, and descriptions of it give phi_freq as the mean router weight
              over the tokens that selected e. This follows the authors' code, which divides by all tokens, so that how
              often e is selected counts too.
    """
    total = torch.where(layer["tokens"] > 0, layer["tokens"], 1.0)
    return layer["gate_sum"] / total * output_variance(layer).sum(dim=-1).sqrt()


def geometric_mean(spread_ED: Tensor) -> Tensor:
    """[E] the geometric mean of each row; 0 where one of its numbers is 0."""
    return spread_ED.log().mean(dim=1).exp()
