"""What is observed: the events that calibration and search make, one per layer and batch.

Letters: T tokens, P pairs (token, expert) sorted by expert, Q pairs of one expert, E experts, D model width,
F expert width, I width of what a router reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A tensor that is too large to be there at once: its rows, in order."""

    shape: tuple[int, ...]
    rows: Iterable[Tensor]


class Event:
    """What happened in one layer. `made_by` says who makes events of a class: "calibration" or "search"."""

    made_by: ClassVar[str] = "calibration"


@dataclass(frozen=True, eq=False)
class RouterEvent(Event):
    """What a layer's router said about one batch: raw logits, samples one after the other, padding left out."""

    logits_TE: Tensor
    sample_lengths: tuple[int, ...]  # tokens of each sample, none of them 0; they add up to T

    @cached_property
    def wide_TE(self) -> Tensor:
        return wide(self.logits_TE)


@dataclass(frozen=True, eq=False)
class RoutedEvent(Event):
    """What a layer's experts did with one batch: its selected pairs sorted by expert, padding left out."""

    expert_P: Tensor
    gate_P: Tensor  # the weights that the model multiplies the outputs with
    out_PD: Tensor  # outputs before the gate
    counts: tuple[int, ...]  # pairs of each of the E experts; on the host, because they cut tensors
    in_PD: Tensor | None = None  # what went in and the input of the last product: only where a statistic that is
    hidden_PF: Tensor | None = None  # declared with inside=True is collected
    token_P: Tensor | None = None  # which token of the batch each pair is of
    id_P: Tensor | None = None  # of these tokens: the number in the vocabulary
    # How far the routed output turns the pair's token: only where a statistic that is declared with turns=True is collected.
    turn_P: Tensor | None = None
    vocab_size: int = 0

    def of_tokens(self, keep_T: Tensor) -> RoutedEvent:
        """The pairs of some of the batch's tokens."""
        keep_P = keep_T.to(self.token_P.device)[self.token_P]
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: value_P[keep_P] for name, value_P in given.items() if isinstance(value_P, Tensor)}
        counts = torch.bincount(kept["expert_P"], minlength=len(self.counts)).tolist()
        return replace(self, counts=tuple(counts), **kept)

    def detached(self) -> RoutedEvent:
        """The same without the way back to weights."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.detach() for name, x in given.items() if isinstance(x, Tensor)})

    @property
    def norm_P(self) -> Tensor:
        return self.moments[2]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """[E, D] sums and sums of squares over every expert's outputs, and the norm of each output [P].

        One expert's outputs at a time, so that what is float64 of them stays in the processor's cache.
        """
        num_experts, width = len(self.counts), self.out_PD.shape[1]
        sum_ED = self.out_PD.new_zeros(num_experts, width, dtype=torch.float64)
        square_ED, square_P = torch.zeros_like(sum_ED), sum_ED.new_empty(len(self.out_PD))
        parts = zip(sum_ED, square_ED, *(x.split(list(self.counts)) for x in (self.out_PD, square_P)), strict=True)
        for sum_D, square_D, out_QD, square_Q in parts:
            wide_QD = out_QD.double()
            torch.sum(wide_QD, dim=0, out=sum_D)
            squared_QD = wide_QD.square()
            torch.sum(squared_QD, dim=0, out=square_D)
            torch.sum(squared_QD, dim=1, out=square_Q)
        return sum_ED, square_ED, square_P.sqrt_()

    @cached_property
    def lengths_E(self) -> Tensor:
        return torch.tensor(self.counts, device=self.out_PD.device)

    def by_token(self, value_P: Tensor) -> Tensor:
        """[T, E] float64: a number of each pair in its token's row and its expert's column, 0 elsewhere."""
        rows = int(self.token_P.max()) + 1 if len(self.token_P) else 0
        value_TE = value_P.new_zeros(rows, len(self.counts), dtype=torch.float64)
        value_TE[self.token_P, self.expert_P] = value_P.double()
        return value_TE

    def sum_pairs(self, value_P: Tensor) -> Tensor:
        """[E] sums of one number per pair. Unlike index_add_ it gives the same bits every time on a GPU too."""
        return torch.segment_reduce(value_P.double(), "sum", lengths=self.lengths_E, unsafe=True)

    def gram(self, x_PI: Tensor) -> Rows:
        """[E, I, I] sums of x x^T, an expert's when it is asked for; a batch's products are float32."""
        by_expert = (wide(x_QI) for x_QI in x_PI.split(list(self.counts)))
        return Rows((len(self.counts), x_PI.shape[1], x_PI.shape[1]), (x_QI.T @ x_QI for x_QI in by_expert))


@dataclass(frozen=True, eq=False)
class WeightsEvent(Event):
    """The weights of one layer, once for a model. One layer's experts are in memory."""

    experts: tuple[
        tuple[Tensor, ...], ...
    ]  # of every expert gate [F, D] (where there is one), up [F, D] and down [D, F]
    router_EI: Tensor  # the router's matrix


@dataclass(frozen=True, eq=False)
class EveryExpertEvent(Event):
    """What all experts of one layer would give for some tokens."""

    out_TED: Tensor

    @cached_property
    def gram_TEE(self) -> Tensor:
        """Products of each token's outputs with one another, in float64."""
        wide_TED = self.out_TED.double()
        return wide_TED @ wide_TED.mT


@dataclass(frozen=True, eq=False)
class DecoderLayerEvent(Event):
    """What went into the decoder layer that some experts are in, and what came out of it, padding left out."""

    before_TD: Tensor
    after_TD: Tensor


@dataclass(frozen=True, eq=False)
class HiddenGradientEvent(Event):
    """What came back from the loss to the hidden states of a layer's experts: its pairs sorted by expert, no padding."""

    counts: tuple[int, ...]
    hidden_gradient_PF: Tensor


@dataclass(frozen=True, eq=False)
class WeightGradientEvent(Event):
    """What came back from the loss of one batch to the weights of a layer's experts."""

    experts: tuple[
        tuple[Tensor, ...], ...
    ]  # of every expert gate [F, D] (where there is one), up [F, D] and down [D, F]


@dataclass(frozen=True, eq=False)
class SearchEvent(Event):
    """What a method's search found out about one layer, by statistic name."""

    made_by: ClassVar[str] = "search"
    found: Mapping[str, Tensor]


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
