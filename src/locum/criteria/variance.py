"""Criteria that read how much an expert's output varies."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics, output_variance
from .criterion import criterion


@criterion("mone", paper="arXiv:2507.00390", needs=("count", "gate_sum", "output_square", "output_sum", "tokens"))
def mone(layer: LayerStatistics) -> Tensor:
    """How badly a constant would stand in for an expert: its gate weight times the spread of its outputs.

    S_e = (G_e / T) || sqrt( Var_{t in T_e} f_e(x_t) ) ||_2,  G_e = sum_{t in T_e} g_t,e, T all tokens, Var unbiased

    Needs:    count, gate_sum, output_sum, output_square, tokens; routed tokens, and the number of all.
    Shapes:   returns (E,) float64.
    Units:    hidden-state L2 norm; comparable within a layer.
    Order:    higher means keep; a low value marks an expert that its mean output replaces well.
    Edges:    0, the lowest value, for a never-routed expert, one with a single token and one whose output is constant;
              these tie.
    Raises:   StatisticsError if a needed statistic was not collected.
    Cost:     2E*D numbers per layer, two passes over expert outputs.
    Source:   MoNE, arXiv 2507.00390 (redundancy phi = phi_var * phi_freq). Differs: descriptions of the paper give
              phi_freq as the mean gate over the tokens that selected e; this follows the authors' code, which divides
              by all tokens, so that how often e is selected counts too.
    """
    total = torch.where(layer["tokens"] > 0, layer["tokens"], 1.0)
    return layer["gate_sum"] / total * output_variance(layer).sum(dim=-1).sqrt()
