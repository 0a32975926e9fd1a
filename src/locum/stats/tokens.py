"""Statistics of which tokens an expert gets, and of what its layer does with them.

Letters: T tokens, P pairs (token, expert) sorted by expert, Q pairs of one expert, E experts, D model width, V vocabulary, U rows of
a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .definitions import statistic
from .events import DecoderLayerEvent, RoutedEvent, Rows
from .merging import sample_of


@statistic("token_count", axes="EV", event=RoutedEvent, on_demand=True, by_domain=False)
def token_count(event: RoutedEvent) -> Rows:
    """How often an expert was selected for each token of the vocabulary.

    sum_{t routed to e} [t is token v]

    Needs:    routed tokens and their numbers; collected on demand only.
    Shapes:   (E, V).
    Units:    tokens; sums to `count` over the vocabulary.
    Edges:    0 for a never-routed expert.
    Cost:     E*V float64 per layer (64 experts, 50,000 tokens: 25 MiB), over all domains together.
    Source:   EVTC and ETS of MC-Suite, arXiv 2504.05586.
    """
    by_expert = event.id_P.split(list(event.counts))
    counted = (torch.bincount(id_Q, minlength=event.vocab_size).double() for id_Q in by_expert)
    return Rows((len(event.counts), event.vocab_size), counted)


@statistic("turned_output_norm", axes="E", event=RoutedEvent, on_demand=True, turns=True)
def turned_output_norm(event: RoutedEvent) -> Tensor:
    """The size of what an expert contributed, weighed by how far the layer's routed output turns the token.

    sum_{t routed to e} g_t,e ||f_e(x_t)||_2 max(0, 1 - cos(h_t, h_t + y_t)),  h the hidden state before the norm in front of
    the experts' block, y the sum of the routed experts' outputs times their gates

    Needs:    routed tokens' gates and outputs, and the hidden state before the norm; collected on demand only.
    Shapes:   (E,).
    Units:    hidden-state L2 norm; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     one cosine per token.
    Source:   EASY-EP, arXiv 2504.06792. Shared experts are left out of y, as in its code.
    """
    return event.sum_pairs(event.gate_P * event.norm_P * event.turn_P)


@statistic("turn_sum", axes="", event=RoutedEvent, on_demand=True, turns=True)
def turn_sum(event: RoutedEvent) -> Tensor:
    """How far the layer's routed output turns a token, over all tokens.

    sum_t max(0, 1 - cos(h_t, h_t + y_t)),  h the hidden state before the norm in front of the experts' block, y the sum of the
    routed experts' outputs times their gates

    Needs:    routed tokens, and the hidden state before the norm; collected on demand only.
    Shapes:   a single number.
    Units:    none; a token adds 0 where its direction stays, 2 at most.
    Edges:    0 for a domain without tokens.
    Cost:     one cosine per token.
    Source:   Layer Drop, arXiv 2406.02500, whose similarity is one less the mean of it. Shared experts are left out of y.
    """
    pairs_T = torch.bincount(event.token_P)
    return (event.turn_P.double() / pairs_T[event.token_P]).sum()


@statistic("decoder_turn_sum", axes="", event=DecoderLayerEvent, on_demand=True)
def decoder_turn_sum(event: DecoderLayerEvent) -> Tensor:
    """How far the whole decoder layer turns a token, over all tokens.

    sum_t max(0, 1 - cos(h_t, h'_t)),  h and h' the hidden state before and after the decoder layer

    Needs:    the hidden states around the decoder layer; collected on demand only.
    Shapes:   a single number.
    Units:    none; a token adds 0 where its direction stays, 2 at most.
    Edges:    0 for a domain without tokens. Where a model keeps several hidden states of a token, they count as one long one.
    Cost:     one cosine per token.
    Source:   Block Drop, arXiv 2406.02500, whose similarity is one less the mean of it.
    """
    turn_T = 1 - functional.cosine_similarity(event.before_TD.double(), event.after_TD.double(), dim=-1)
    return turn_T.clamp(min=0).sum()


@statistic("input_sample", axes="UD", event=RoutedEvent, on_demand=True, inside=True, merge="sample")
def input_sample(event: RoutedEvent) -> Tensor:
    """A sample of what a layer's experts are given, for what needs inputs themselves and not their sums.

    the x_t with the largest of keys that the numbers of each x_t make, as if drawn at random

    Needs:    routed tokens' expert inputs; collected on demand only.
    Shapes:   (512, D), rows of zeros where there are fewer tokens.
    Units:    hidden state.
    Edges:    the same tokens give the same sample, in whatever batches they come; of domains together it is the sample of all their
              tokens. A token that selects no expert is not there.
    Cost:     512*D float64 per layer and domain; a few whole-number operations for each number that goes in.
    Source:   not from a paper; the rows with the smallest or largest hashes, as in bottom-k sketches.
    """
    order_P = event.token_P.argsort(stable=True)
    token_P = event.token_P[order_P]
    first_P = torch.ones_like(token_P, dtype=torch.bool)
    first_P[1:] = token_P[1:] != token_P[:-1]
    return sample_of(event.in_PD[order_P[first_P]].double())
