"""Criteria of MC-Suite that look at pairs of experts: of the pair that is most (or least) alike, the less used one goes first.

Letters: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("ecc_max", paper="arXiv 2504.05586 (MC-Suite)", needs=("co_count", "count", "gate_sum"))
def ecc_max(layer: LayerStatistics) -> Tensor:
    """Expert co-activation count, the largest first: of the two that are selected together most, the less used one goes.

    S_e = the step at which e goes: in step 1, 2, ..., of the pair (p, q) of those left with the most tokens that selected
    both, the one with the smaller n

    Units:    steps.
    Edges:    equal pairs and equal counts go by n, then by gate mass.
    Cost:     E*E numbers per layer.
    Differs:  the paper drops one expert, fine-tunes and counts anew; this is the order that one count gives.
    """
    return _steps(layer["co_count"], layer["count"], layer["gate_sum"])


@criterion("ecc_min", paper="arXiv 2504.05586 (MC-Suite)", needs=("co_count", "count", "gate_sum"))
def ecc_min(layer: LayerStatistics) -> Tensor:
    """Expert co-activation count, the smallest first: of the two that are selected together least, the less used one goes.

    S_e = the step at which e goes, as in `ecc_max` with the fewest tokens that selected both

    Units:    steps.
    Edges:    equal pairs and equal counts go by n, then by gate mass.
    Cost:     E*E numbers per layer.
    Differs:  the paper drops one expert, fine-tunes and counts anew; this is the order that one count gives.
    """
    return _steps(-layer["co_count"], layer["count"], layer["gate_sum"])


@criterion("ets_max", paper="arXiv 2504.05586 (MC-Suite)", needs=("token_count", "count", "gate_sum"))
def ets_max(layer: LayerStatistics) -> Tensor:
    """Expert token similarity, the largest first: of the two that share most of the vocabulary, the less used one goes.

    S_e = the step at which e goes, as in `ecc_max` with the number of different tokens that both were selected for

    Units:    steps.
    Edges:    equal pairs and equal counts go by n, then by gate mass.
    Cost:     E*V numbers per layer, V the vocabulary.
    Differs:  the paper's best criterion of those that read routing. It says "shared tokens"; here these are tokens of the
              vocabulary, since the same places of the text are what `ecc_max` counts. One estimate, as there.
    """
    return _steps(_shared(layer), layer["count"], layer["gate_sum"])


@criterion("ets_min", paper="arXiv 2504.05586 (MC-Suite)", needs=("token_count", "count", "gate_sum"))
def ets_min(layer: LayerStatistics) -> Tensor:
    """Expert token similarity, the smallest first: of the two that share least of the vocabulary, the less used one goes.

    S_e = the step at which e goes, as in `ecc_min` with the number of different tokens that both were selected for

    Units:    steps.
    Edges:    equal pairs and equal counts go by n, then by gate mass.
    Cost:     E*V numbers per layer, V the vocabulary.
    Differs:  as `ets_max`.
    """
    return _steps(-_shared(layer), layer["count"], layer["gate_sum"])


def _shared(layer: LayerStatistics) -> Tensor:
    """[E, E] different tokens that two experts were both selected for."""
    seen_EV = layer["token_count"].clamp(max=1)
    return seen_EV @ seen_EV.T


def _steps(alike_EE: Tensor, count_E: Tensor, gate_E: Tensor) -> Tensor:
    """The step, from 1, at which each expert goes; 0 for those that are never routed."""
    if bool(alike_EE.isnan().any()):
        return torch.where(alike_EE.isnan().any(dim=1), torch.nan, 0.0)
    use, alike = list(zip(count_E.tolist(), gate_E.tolist(), strict=True)), alike_EE.tolist()
    step_E = torch.zeros_like(count_E)
    left = [e for e in range(len(use)) if use[e][0] > 0]
    for step in range(1, len(left) + 1):
        pairs = [(alike[p][q], p, q) for p in left for q in left if p < q]
        most = max((value for value, _, _ in pairs), default=0.0)
        less_used = [min(p, q, key=use.__getitem__) for value, p, q in pairs if value == most] or left
        gone = min(less_used, key=use.__getitem__)
        step_E[gone] = step
        left.remove(gone)
    return step_E
