"""Statistics of the experts that one token selected together.

Letters: T tokens, K top-k, P pairs (token, expert) sorted by expert, E experts, D model width.
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


PIECE = 2**22  # numbers of outputs that are held in float64 at a time


@statistic("gated_output_product", axes="EE", event=RoutedEvent, on_demand=True)
def gated_output_product(event: RoutedEvent) -> Tensor:
    """How two experts' contributions to the same tokens add up: with it, what any scaling of experts changes in a layer's output.

    sum_{t routed to i and j} g_t,i g_t,j f_i(x_t) . f_j(x_t);  sum_t ||y_t - sum_e m_e g_t,e f_e(x_t)||^2 = (1 - m)^T A (1 - m)

    Needs:    routed tokens' gates and expert outputs; collected on demand only.
    Shapes:   (E, E), symmetric, positive semidefinite.
    Units:    hidden state squared; comparable within a layer.
    Edges:    0 for a never-routed expert, and for two that no token selected together; below 0 where two speak against each other.
    Cost:     E*E float64 per layer and domain; products of T*K*K*D and T*K*E*E.
    Source:   not from a paper; the sums behind the reconstruction error of DiEP, arXiv 2509.16105.
    """
    num_experts, width = len(event.counts), event.out_PD.shape[1]
    total_EE = event.out_PD.new_zeros(num_experts, num_experts, dtype=torch.float64)
    order_P = event.token_P.argsort(stable=True)
    pairs_T = torch.bincount(event.token_P)
    top_k = int(pairs_T.max()) if len(pairs_T) else 1
    first = 0
    for pairs_piece in pairs_T.split(max(1, PIECE // (top_k * max(width, num_experts)))):
        some_P = order_P[first : first + int(pairs_piece.sum())]
        first += len(some_P)
        token_P = torch.arange(len(pairs_piece), device=some_P.device).repeat_interleave(pairs_piece)
        place_P = torch.arange(len(some_P), device=some_P.device) - (pairs_piece.cumsum(0) - pairs_piece)[token_P]
        out_TKD = total_EE.new_zeros(len(pairs_piece), top_k, width)
        out_TKD[token_P, place_P] = event.out_PD[some_P].double() * event.gate_P[some_P].double()[:, None]
        chosen_TKE = total_EE.new_zeros(len(pairs_piece), top_k, num_experts)
        chosen_TKE[token_P, place_P, event.expert_P[some_P]] = 1
        total_EE += chosen_TKE.flatten(0, 1).T @ (out_TKD @ out_TKD.mT @ chosen_TKE).flatten(0, 1)
    return total_EE
