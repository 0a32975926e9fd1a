"""Criteria that read how much an expert's output varies."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics, output_variance
from .criterion import criterion


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
