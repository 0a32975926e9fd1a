"""Criteria of single columns of experts, and what they make of an expert: the sum of its columns.

Letters: E experts, F expert width.
"""

from __future__ import annotations

from torch import Tensor

from ..experts.columns import COLUMNS, camera_columns, heapr_columns
from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("heapr", paper="arXiv 2509.22299 (HEAPr)", needs=COLUMNS["heapr"].needs)
def heapr(layer: LayerStatistics) -> Tensor:
    """The loss that an expert's columns, its atomic experts, would cost by second order, added up.

    S_e = sum_c mean_t h_t,c^2 * W_down[:, c]^T M_e W_down[:, c],  M_e = mean_t g_t g_t^T, g_t = dL / df_e(x_t), means over T_e

    Units:    nats squared.
    Edges:    a rare expert counts by its mean token.
    Cost:     a backward pass; 2*E*F numbers per layer.
    Differs:  the paper ranks columns (`heapr_columns`), over all layers, not experts. W^T M W is taken as the mean square of
              the loss's gradient by h_c, which it equals; where a norm follows the expert, the latter is meant.
    """
    return heapr_columns(layer).sum(dim=1)


@criterion("camera", paper="arXiv 2508.02322 (CAMERA)", needs=COLUMNS["camera"].needs)
def camera(layer: LayerStatistics) -> Tensor:
    """The energy of an expert's columns, its micro-experts, added up.

    S_e = sum_c ||W_down[:, c]||_2^2 (0.1 sum_{t in T_e} a_t,c^2 + 0.9 max_{t in T_e} a_t,c^2),  a_t,c = g_t,e h_t,c, h the
    hidden state that down multiplies

    Units:    hidden-state L2 norm squared.
    Cost:     3*E*F numbers per layer, one pass over hidden states.
    Differs:  the paper ranks columns (`camera_columns`), not experts.
    """
    return camera_columns(layer).sum(dim=1)
