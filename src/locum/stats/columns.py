"""Statistics of every column of an expert: of each number of its hidden state, which one column of `down` multiplies, and of its
input.

Letters: Q pairs of one expert, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .definitions import statistic
from .events import RoutedEvent


def each_expert(x_PF: Tensor, counts: tuple[int, ...], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """[E, F] float64: `reduce` of every expert's rows [Q, F], one expert at a time; 0 where it has none."""
    found_EF = x_PF.new_zeros(len(counts), x_PF.shape[1], dtype=torch.float64)
    for found_F, x_QF in zip(found_EF, x_PF.split(list(counts)), strict=True):
        if len(x_QF):
            found_F.copy_(reduce(x_QF.double()))
    return found_EF


def _squares(x_QF: Tensor) -> Tensor:
    return x_QF.square().sum(dim=0)


def _gated(event: RoutedEvent) -> Tensor:
    return event.hidden_PF.double() * event.gate_P.double()[:, None]


@statistic("hidden_square", axes="EF", event=RoutedEvent, on_demand=True, inside=True)
def hidden_square(event: RoutedEvent) -> Tensor:
    """The sum of squares of each number of an expert's hidden state.

    sum_{t routed to e} h_t,c^2,  h = what the last product (down) multiplies

    Needs:    routed tokens' hidden states; collected on demand only.
    Shapes:   (E, F).
    Units:    hidden activation squared.
    Edges:    0 for a never-routed expert.
    Cost:     E*F float64 per layer and domain; one pass over P*F.
    Source:   HEAPr, arXiv 2509.22299; the diagonal of `hidden_gram`.
    """
    return each_expert(event.hidden_PF, event.counts, _squares)


@statistic("gated_hidden_square", axes="EF", event=RoutedEvent, on_demand=True, inside=True)
def gated_hidden_square(event: RoutedEvent) -> Tensor:
    """The sum of squares of each number of an expert's hidden state, after its gate.

    sum_{t routed to e} (g_t,e h_t,c)^2,  h = what the last product (down) multiplies

    Needs:    routed tokens' gates and hidden states; collected on demand only.
    Shapes:   (E, F).
    Units:    hidden activation squared.
    Edges:    0 for a never-routed expert.
    Cost:     E*F float64 per layer and domain; one pass over P*F.
    Source:   the energy of micro-experts of CAMERA, arXiv 2508.02322.
    """
    return each_expert(_gated(event), event.counts, _squares)


@statistic("gated_hidden_peak", axes="EF", event=RoutedEvent, on_demand=True, inside=True, merge="max")
def gated_hidden_peak(event: RoutedEvent) -> Tensor:
    """The largest that each number of an expert's hidden state ever was, after its gate.

    max_{t routed to e} |g_t,e h_t,c|,  h = what the last product (down) multiplies

    Needs:    routed tokens' gates and hidden states; collected on demand only.
    Shapes:   (E, F).
    Units:    hidden activation. It is a maximum, over domains and files too.
    Edges:    0 for a never-routed expert.
    Cost:     E*F float64 per layer and domain; one pass over P*F.
    Source:   the energy of micro-experts of CAMERA, arXiv 2508.02322.
    """
    return each_expert(_gated(event), event.counts, lambda x_QF: x_QF.abs().amax(dim=0))


@statistic("input_square", axes="ED", event=RoutedEvent, on_demand=True, inside=True)
def input_square(event: RoutedEvent) -> Tensor:
    """The sum of squares of each number of an expert's input.

    sum_{t routed to e} x_t,i^2

    Needs:    routed tokens' inputs; collected on demand only.
    Shapes:   (E, D).
    Units:    hidden state squared.
    Edges:    0 for a never-routed expert.
    Cost:     E*D float64 per layer and domain; one pass over P*D.
    Source:   Wanda, arXiv 2306.11695; the diagonal of `input_gram`.
    """
    return each_expert(event.in_PD, event.counts, _squares)


@statistic("gated_input_square", axes="ED", event=RoutedEvent, on_demand=True, inside=True)
def gated_input_square(event: RoutedEvent) -> Tensor:
    """The sum of squares of each number of an expert's input, times its gate.

    sum_{t routed to e} (g_t,e x_t,i)^2

    Needs:    routed tokens' gates and inputs; collected on demand only.
    Shapes:   (E, D).
    Units:    hidden state squared.
    Edges:    0 for a never-routed expert.
    Cost:     E*D float64 per layer and domain; one pass over P*D.
    Source:   MoE-Pruner, arXiv 2410.12013.
    """
    return each_expert(event.in_PD.double() * event.gate_P.double()[:, None], event.counts, _squares)
