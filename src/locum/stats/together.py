"""Statistics of the experts that one token selected together.

Letters: T tokens, P pairs (token, expert) sorted by expert, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .definitions import statistic
from .events import RoutedEvent


@statistic("co_count", axes="EE", event=RoutedEvent, on_demand=True)
def co_count(event: RoutedEvent) -> Tensor:
    """How many tokens selected two experts together.

    sum_t [i in selected(t)] [j in selected(t)]

    Needs:    routed tokens; collected on demand only.
    Shapes:   (E, E), symmetric, with `count` on its diagonal.
    Units:    tokens.
    Edges:    0 for a never-routed expert.
    Cost:     E*E float64 per layer and domain; one product of T*E*E.
    Source:   ECC of MC-Suite, arXiv 2504.05586; co-activation of STUN, arXiv 2409.06211.
    """
    chosen_TE = event.by_token(torch.ones_like(event.gate_P))
    return chosen_TE.T @ chosen_TE


@statistic("renormalised_output_norm", axes="E", event=RoutedEvent, on_demand=True)
def renormalised_output_norm(event: RoutedEvent) -> Tensor:
    """The size of what an expert contributed, with gates that add up to one for every token.

    sum_{t routed to e} (g_t,e / sum_{j in selected(t)} g_t,j) ||f_e(x_t)||_2

    Needs:    routed tokens' gates and expert outputs; collected on demand only.
    Shapes:   (E,).
    Units:    hidden-state L2 norm; comparable within a layer.
    Edges:    0 for a never-routed expert, and for tokens whose gates are all 0.
    Cost:     T*E numbers for a while; one pass over P*D, shared with the norms.
    Source:   `renormalize_router_weights` of REAP's code, arXiv 2510.13999.
    """
    total_P = event.by_token(event.gate_P).sum(dim=1)[event.token_P]
    share_P = torch.where(total_P != 0, event.gate_P / torch.where(total_P != 0, total_P, 1.0), 0.0)
    return event.sum_pairs(share_P * event.norm_P)


@statistic("gated_norm_product", axes="EE", event=RoutedEvent, on_demand=True)
def gated_norm_product(event: RoutedEvent) -> Tensor:
    """How much two experts contribute to the same tokens: the product of their sizes after the gate, for HOPE's pairs.

    sum_{t routed to i and j} g_t,i ||f_i(x_t)||_2 g_t,j ||f_j(x_t)||_2

    Needs:    routed tokens' gates and expert outputs; collected on demand only.
    Shapes:   (E, E), symmetric, the sum of an expert's squared contributions on its diagonal.
    Units:    hidden-state L2 norm squared; comparable within a layer.
    Edges:    0 for a never-routed expert, and for two that no token selected together.
    Cost:     E*E float64 per layer and domain; one product of T*E*E.
    Source:   HOPE, arXiv 2609.18916.
    """
    size_TE = event.by_token(event.norm_P * event.gate_P)
    return size_TE.T @ size_TE
