"""How a token's weight is shared among the experts that it selected: what thresholds of routing policies follow from.

Histograms over [0, 1] of one number for every expert of a token but its heaviest, and a sample of tokens' weights.

Letters: T tokens, K top-k, E experts, U rows of a sample, P pairs (token, expert), H bins of a histogram, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .definitions import statistic
from .events import RoutedEvent
from .merging import sample_of

BINS = 1024


def _ranked(event: RoutedEvent) -> Tensor:
    """[T, K] float64 sizes of the weights of every token that selected experts, the heaviest first."""
    gate_TE = event.by_token(event.gate_P.abs())
    counts_T = torch.bincount(event.token_P, minlength=len(gate_TE))
    top_k = int(counts_T.max()) if len(counts_T) else 0
    return gate_TE[counts_T > 0].topk(top_k, dim=1).values


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def _histogram(value: Tensor, upper: bool = False) -> Tensor:
    """[H] how many values lie in every bin [b, b + 1) / H; with `upper` (b, b + 1] / H. Values beyond are in the last one."""
    at = (value.flatten() * BINS).clamp(0, BINS)
    bins = at.ceil() - 1 if upper else at.floor()
    return torch.bincount(bins.long().clamp(0, BINS - 1), minlength=BINS).double()


@statistic("gate_ratio", axes="H", event=RoutedEvent, on_demand=True)
def gate_ratio(event: RoutedEvent) -> Tensor:
    """How much less than its heaviest expert a token gives the others, as a histogram.

    of w_r / w_1 for r = 2 ... K, w_1 >= w_2 >= ... the token's weights

    Needs:    routed tokens' gates; collected on demand only.
    Shapes:   (1024,), K - 1 counts for every token.
    Units:    pairs of a token and an expert.
    Edges:    0 everywhere where the router selects one expert; a token without weight counts in the first bin.
    Cost:     1024 float64 per layer and domain; one sort of T*E.
    Source:   the w_2 / w_1 of dynamic skipping (NAEE), arXiv 2402.14800, for any top-k.
    """
    gate_TK = _ranked(event)
    return _histogram(_share(gate_TK[:, 1:], gate_TK[:, :1]))


@statistic("gate_share", axes="H", event=RoutedEvent, on_demand=True)
def gate_share(event: RoutedEvent) -> Tensor:
    """What part of its weight a token gives every expert but its heaviest, as a histogram.

    of w_r / sum_j w_j for r = 2 ... K, w_1 >= w_2 >= ... the token's weights

    Needs:    routed tokens' gates; collected on demand only.
    Shapes:   (1024,), K - 1 counts for every token.
    Units:    pairs of a token and an expert.
    Edges:    0 everywhere where the router selects one expert; a token without weight counts in the first bin.
    Cost:     1024 float64 per layer and domain; one sort of T*E.
    Source:   not from a paper; for skipping experts with little gate.
    """
    gate_TK = _ranked(event)
    return _histogram(_share(gate_TK[:, 1:], gate_TK.sum(dim=1, keepdim=True)))


@statistic("prefix_share", axes="H", event=RoutedEvent, on_demand=True)
def prefix_share(event: RoutedEvent) -> Tensor:
    """What part of a token's weight its heaviest experts have together, as a histogram, for top-p of those selected.

    of sum_{j < r} w_j / sum_j w_j for r = 2 ... K, w_1 >= w_2 >= ... the token's weights

    Needs:    routed tokens' gates; collected on demand only.
    Shapes:   (1024,), K - 1 counts for every token; a bin has its upper edge and not its lower one.
    Units:    pairs of a token and an expert.
    Edges:    0 everywhere where the router selects one expert; a token without weight counts in the first bin.
    Cost:     1024 float64 per layer and domain; one sort of T*E.
    Source:   dynamic routing, arXiv 2403.07652, whose threshold follows from it.
    """
    gate_TK = _ranked(event)
    return _histogram(_share(gate_TK.cumsum(dim=1)[:, :-1], gate_TK.sum(dim=1, keepdim=True)), upper=True)


@statistic("prefix_gate", axes="H", event=RoutedEvent, on_demand=True)
def prefix_gate(event: RoutedEvent) -> Tensor:
    """How much weight a token's heaviest experts have together, as a histogram, for top-p of all experts.

    of sum_{j < r} w_j for r = 2 ... K, w_1 >= w_2 >= ... the token's weights

    Needs:    routed tokens' gates; collected on demand only.
    Shapes:   (1024,), K - 1 counts for every token; a bin has its upper edge and not its lower one.
    Units:    pairs of a token and an expert.
    Edges:    0 everywhere where the router selects one expert; sums of more than one count in the last bin.
    Cost:     1024 float64 per layer and domain; one sort of T*E.
    Source:   dynamic routing, arXiv 2403.07652, whose threshold follows from it.
    """
    return _histogram(_ranked(event).cumsum(dim=1)[:, :-1], upper=True)


@statistic("gate_sample", axes="UE", event=RoutedEvent, on_demand=True, merge="sample")
def gate_sample(event: RoutedEvent) -> Tensor:
    """A sample of what tokens give every expert, for what their whole choice decides, such as how many devices they touch.

    the rows of weights, 0 for experts that the token did not select, with the largest of keys that their numbers make

    Needs:    routed tokens' gates; collected on demand only.
    Shapes:   (512, E), rows of zeros where there are fewer tokens.
    Units:    gates, after the model's own renormalisation and scaling.
    Edges:    the same tokens give the same sample, in whatever batches they come; of domains together it is the sample of all
              their tokens.
    Cost:     512*E float64 per layer and domain; a few whole-number operations for each number that goes in.
    Source:   not from a paper; the rows with the largest hashes, as in bottom-k sketches.
    """
    gate_TE = event.by_token(event.gate_P)
    return sample_of(gate_TE[torch.bincount(event.token_P, minlength=len(gate_TE)) > 0])


def running(histogram_LH: Tensor, tokens_L: Tensor, below: bool) -> Tensor:
    """[L, H + 1] experts that run for a token, on average, at every threshold 0, 1 / H, ... 1.

    A token runs its heaviest expert, and of the others those whose number is below the threshold, or those whose number is not.
    """
    sums_LH = histogram_LH.cumsum(dim=1)
    under_LH = torch.cat([sums_LH.new_zeros(len(sums_LH), 1), sums_LH], dim=1)
    counted_LH = under_LH if below else under_LH[:, -1:] - under_LH
    return 1 + counted_LH / tokens_L.clamp(min=1)[:, None]


def nearest(running_H: Tensor, wanted: float) -> float:
    """The threshold at which the number of experts that run is nearest to what is wanted; of several the least."""
    return int((running_H - wanted).abs().argmin()) / BINS
