"""Criteria that read the norms of experts' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("ean", paper="arXiv:2510.13999", needs=("output_norm",))
def ean(layer: LayerStatistics) -> Tensor:
    """Expert activation norm, over tokens: how much an expert says in total, before its gate.

    S_e = sum_{t in T_e} ||f_e(x_t)||_2

    Needs:    output_norm; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    hidden-state L2 norm; comparable within a layer (norms grow with depth).
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; equal sums tie.
    Raises:   StatisticsError if output_norm was not collected.
    Cost:     E numbers per layer, one pass over expert outputs.
    Source:   "EAN" as REAP's paper and code (ean_sum) read it, arXiv 2510.13999. Differs: MC-Suite, which named it,
              takes norms along tokens instead; that reading is `ean_dims`. This one grows with n_e, that with sqrt(n_e).
    """
    return layer["output_norm"].clone()


@criterion("ean_dims", paper="arXiv:2504.05586", needs=("output_square",))
def ean_dims(layer: LayerStatistics) -> Tensor:
    """Expert activation norm, over dimensions: MC-Suite's own definition and its best criterion.

    S_e = sum_d sqrt( sum_{t in T_e} f_e(x_t)_d^2 )

    Needs:    output_square; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    hidden-state value times sqrt(tokens); comparable within a layer.
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; equal sums tie.
    Raises:   StatisticsError if output_square was not collected.
    Cost:     E*D numbers per layer, one pass over expert outputs.
    Source:   Finding Fantastic Experts in MoEs (MC-Suite), arXiv 2504.05586, EAN, which drops the minimum. Differs: the
              paper re-estimates after every expert dropped and fine-tunes in between; this is one estimate. REAP's
              "EAN" is `ean`.
    """
    return layer["output_square"].clamp(min=0).sqrt().sum(dim=-1)


@criterion("reap", paper="arXiv:2510.13999", needs=("count", "gated_output_norm"))
def reap(layer: LayerStatistics) -> Tensor:
    """Router-weighted expert activation: how much an expert contributes whenever it is selected.

    S_e = (1 / n_e) sum_{t in T_e} g_t,e ||f_e(x_t)||_2

    Needs:    count, gated_output_norm; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    hidden-state L2 norm; comparable within a layer (norms grow with depth).
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; a rare but strong one ranks high; equal means tie.
    Raises:   StatisticsError if a needed statistic was not collected.
    Cost:     2E numbers per layer, one pass over expert outputs.
    Source:   REAP, arXiv 2510.13999. Differs: its code multiplies with the full softmax unless told to renormalise;
              here g is the gate that the model itself uses, which the paper's formula says. The two agree where gates
              are neither renormalised nor scaled.
    """
    count_E = layer["count"]
    return torch.where(count_E > 0, layer["gated_output_norm"] / torch.where(count_E > 0, count_E, 1.0), 0.0)
