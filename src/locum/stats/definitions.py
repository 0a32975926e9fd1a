"""What is counted: the events that calibration and search make, and the definitions that turn one event into numbers.

A definition turns one event (what a router or the experts of one layer did with one batch of one domain, or what a
search found out about one layer) into what it adds. It knows nothing of models or files.

Letters: T tokens, P pairs (token, expert) sorted by expert, Q pairs of one expert, or tokens of one sample, E experts,
D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..registry import Registry
from .events import Event, RoutedEvent, RouterEvent, Rows, SearchEvent


@dataclass(frozen=True)
class StatisticDefinition:
    """One statistic: a function from an event to the increment of its sum, its axes and the kind of event it takes."""

    name: str
    axes: str  # one letter per axis, "" for a single number
    event: type[Event]
    increment: Callable[[Any], Tensor | Rows]
    on_demand: bool = False  # collected only when a method's needs name it
    # Reads the experts' inputs and hidden states, which calibration keeps for such statistics alone.
    inside: bool = False
    turns: bool = (
        False  # reads how far the routed output turns a token, which calibration computes for such statistics alone
    )
    # Kept apart for every domain; else added up over all of them, where it is too large for that.
    by_domain: bool = True
    merge: str = "sum"  # how two of it become one (merging.py)

    @property
    def searched(self) -> bool:
        """Whether it is found by trying removals on the model: calibration cannot give it, and it does not add up."""
        return self.event.made_by == "search"


STATISTICS: Registry[StatisticDefinition] = Registry("statistic", entry_points="locum.statistics")


def statistic(
    name: str, axes: str, event: type[Event], **how: Any
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the function below as the definition of a statistic; `how` are further fields of StatisticDefinition."""

    def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        STATISTICS.add(name, StatisticDefinition(name, axes, event, function, **how))
        return function

    return register


@statistic("tokens", axes="", event=RouterEvent)
def tokens(event: RouterEvent) -> Tensor:
    """The number of tokens that passed the router, for means over all tokens.

    sum_t 1

    Needs:    every token's router logits (their number).
    Shapes:   a single number.
    Units:    tokens.
    Edges:    padding is not counted; 0 for a domain without tokens.
    Cost:     none.
    Source:   not from a paper.
    """
    return torch.tensor(float(len(event.logits_TE)), dtype=torch.float64)


@statistic("samples", axes="", event=RouterEvent)
def samples(event: RouterEvent) -> Tensor:
    """The number of samples (blocks of text that the model sees as one sequence), for means over samples.

    sum_s 1

    Needs:    the samples' lengths.
    Shapes:   a single number.
    Units:    samples.
    Edges:    a sample of nothing but padding is not counted.
    Cost:     none.
    Source:   not from a paper.
    """
    return torch.tensor(float(len(event.sample_lengths)), dtype=torch.float64)


@statistic("softmax_sum", axes="E", event=RouterEvent)
def softmax_sum(event: RouterEvent) -> Tensor:
    """Router probability that all tokens together gave an expert, selected or not.

    sum_t softmax(logits_t)_e over all E experts

    Needs:    every token's router logits.
    Shapes:   (E,).
    Units:    tokens (an expert's probability mass); sums to `tokens` within a layer.
    Edges:    a never-selected expert has a positive value; sigmoid routers get the softmax all the same.
    Cost:     one softmax over T*E.
    Source:   soft counts of SEER-MoE, arXiv 2404.05089, and Expert Drop, arXiv 2406.02500.
    """
    return event.wide_TE.softmax(dim=-1).sum(dim=0, dtype=torch.float64)


@statistic("router_entropy", axes="", event=RouterEvent, on_demand=True)
def router_entropy(event: RouterEvent) -> Tensor:
    """How undecided the router is, over all tokens.

    sum_t -sum_e p_t,e log p_t,e,  p_t = softmax(logits_t) over all E experts

    Needs:    every token's router logits; collected on demand only.
    Shapes:   a single number.
    Units:    nats; divide by `tokens` and by log E for a share of the largest that there is.
    Edges:    0 without tokens; sigmoid routers get the softmax all the same.
    Cost:     one softmax over T*E.
    Source:   the diagnosis of MESA, arXiv 2609.04453.
    """
    log_TE = event.wide_TE.log_softmax(dim=-1)
    return -(log_TE.exp() * log_TE.clamp(min=torch.finfo(log_TE.dtype).min)).sum(dtype=torch.float64)


@statistic("logit_norm", axes="", event=RouterEvent)
def logit_norm(event: RouterEvent) -> Tensor:
    """How strongly the router speaks in this layer, for LightMoE's layer weights.

    sum_t ||logits_t||_2

    Needs:    every token's raw router logits.
    Shapes:   a single number.
    Units:    logits; comparable across layers per token; LightMoE compresses layers with more of it less.
    Edges:    0 without tokens.
    Cost:     one pass over T*E.
    Source:   LightMoE, arXiv 2603.12645, section 3.1. Differs: the paper says "norm of the router output" without a
              definition; its figure suggests a norm over a sample's whole logit matrix. Only ratios between layers
              enter, which the two readings leave nearly equal.
    """
    return torch.linalg.vector_norm(event.wide_TE, dim=-1).sum(dtype=torch.float64)


@statistic("logit_cosine", axes="EE", event=RouterEvent)
def logit_cosine(event: RouterEvent) -> Tensor:
    """How alike two experts are routed: the cosine of their logits over a sample's tokens, summed over samples.

    sum_s cos(L_s[:, i], L_s[:, j]),  L_s = the raw logits [Q, E] of sample s

    Needs:    every token's raw router logits, and where samples begin; divide by `samples` for the mean.
    Shapes:   (E, E), symmetric.
    Units:    samples (a cosine per sample, -1 to 1; higher is more alike).
    Edges:    an expert whose logits are 0 on a whole sample has cosine 0 with all, itself included.
    Cost:     E*E float64 per layer and domain; one product of T*E*E.
    Source:   LightMoE, arXiv 2603.12645, section 3.2. Differs: MC-SMoE's code, which it follows, maps cosines to
              (cos + 1) / 2 over a whole batch; the order of pairs within a sample is the same.
    """
    num_experts = event.logits_TE.shape[1]
    total_EE = event.wide_TE.new_zeros(num_experts, num_experts, dtype=torch.float64)
    for logits_QE in event.wide_TE.split(list(event.sample_lengths)):
        norm_E = torch.linalg.vector_norm(logits_QE, dim=0)
        unit_QE = logits_QE / torch.where(norm_E > 0, norm_E, 1.0)
        total_EE += unit_QE.T @ unit_QE
    return total_EE


@statistic("count", axes="E", event=RoutedEvent)
def count(event: RoutedEvent) -> Tensor:
    """The number of tokens that selected an expert.

    n_e = sum_t [e in selected(t)]

    Needs:    routed tokens.
    Shapes:   (E,).
    Units:    tokens; sums to top_k * tokens within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     none.
    Source:   hard counts of SEER-MoE, arXiv 2404.05089; EUF of MC-Suite, arXiv 2504.05586.
    """
    return torch.tensor(event.counts, dtype=torch.float64)


@statistic("gate_sum", axes="E", event=RoutedEvent)
def gate_sum(event: RoutedEvent) -> Tensor:
    """The weight that the model gave an expert's outputs, over the tokens that selected it.

    sum_{t routed to e} g_t,e,  g = exactly the weights that the model passes to its experts module

    Needs:    routed tokens.
    Shapes:   (E,).
    Units:    gates, after the model's own renormalisation and scaling; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     none to speak of.
    Source:   LightMoE, arXiv 2603.12645, Eq. 2, read with gates masked to the selected experts as its Eq. 1 uses them.
    """
    return event.sum_pairs(event.gate_P)


@statistic("output_norm", axes="E", event=RoutedEvent)
def output_norm(event: RoutedEvent) -> Tensor:
    """The size of what an expert said, before its gate.

    sum_{t routed to e} ||f_e(x_t)||_2

    Needs:    routed tokens' expert outputs.
    Shapes:   (E,).
    Units:    hidden-state L2 norm; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     one pass over P*D, shared with the other norms and sums of outputs.
    Source:   "ean_sum" of REAP's code, arXiv 2510.13999.
    """
    return event.sum_pairs(event.norm_P)


@statistic("gated_output_norm", axes="E", event=RoutedEvent)
def gated_output_norm(event: RoutedEvent) -> Tensor:
    """The size of what an expert contributed, after its gate.

    sum_{t routed to e} g_t,e ||f_e(x_t)||_2

    Needs:    routed tokens' gates and expert outputs.
    Shapes:   (E,).
    Units:    hidden-state L2 norm; comparable within a layer.
    Edges:    0 for a never-routed expert.
    Cost:     one pass over P*D, shared with the other norms and sums of outputs.
    Source:   REAP, arXiv 2510.13999. Differs: its code takes g from the full softmax by default; here g is what the
              model uses (they agree where gates are neither renormalised nor scaled).
    """
    return event.sum_pairs(event.norm_P * event.gate_P)


@statistic("output_peak", axes="E", event=RoutedEvent, merge="max")
def output_peak(event: RoutedEvent) -> Tensor:
    """The largest number that an expert ever put out, which tells the experts that make massive activations.

    max_{t routed to e, d} |f_e(x_t)_d|

    Needs:    routed tokens' expert outputs.
    Shapes:   (E,).
    Units:    hidden state; comparable across layers. It is a maximum, over domains and files too.
    Edges:    0 for a never-routed expert.
    Cost:     one pass over P*D.
    Source:   Super Experts, arXiv 2507.23279; "max_activations" of REAP's code, arXiv 2510.13999. Differs: that code takes
              the largest signed number.
    """
    peak_P = event.out_PD.abs().amax(dim=1).double() if len(event.out_PD) else event.gate_P.new_zeros(0).double()
    return torch.segment_reduce(peak_P, "max", lengths=event.lengths_E, unsafe=True, initial=0.0)


@statistic("output_sum", axes="ED", event=RoutedEvent)
def output_sum(event: RoutedEvent) -> Tensor:
    """The sum of an expert's outputs, from which its mean output (a constant stand-in) is made.

    sum_{t routed to e} f_e(x_t)

    Needs:    routed tokens' expert outputs.
    Shapes:   (E, D).
    Units:    hidden state.
    Edges:    0 for a never-routed expert.
    Cost:     E*D float64 per layer and domain; one pass over P*D, shared with the norms.
    Source:   the novices of MoNE, arXiv 2507.00390.
    """
    return event.moments[0]


@statistic("output_square", axes="ED", event=RoutedEvent)
def output_square(event: RoutedEvent) -> Tensor:
    """The sum of squares of an expert's outputs, from which their variance is made.

    sum_{t routed to e} f_e(x_t)^2, elementwise

    Needs:    routed tokens' expert outputs.
    Shapes:   (E, D).
    Units:    hidden state squared.
    Edges:    0 for a never-routed expert.
    Cost:     E*D float64 per layer and domain; one pass over P*D, shared with the norms.
    Source:   the variance of MoNE, arXiv 2507.00390; EAN of MC-Suite, arXiv 2504.05586.
    """
    return event.moments[1]


@statistic("input_gram", axes="EDD", event=RoutedEvent, on_demand=True, inside=True, by_domain=False)
def input_gram(event: RoutedEvent) -> Rows:
    """The second moments of what an expert is given, for adapters of gate and up that fit its inputs best.

    sum_{t routed to e} x_t x_t^T

    Needs:    routed tokens' expert inputs; collected on demand only.
    Shapes:   (E, D, D), symmetric, positive semidefinite.
    Units:    hidden state squared.
    Edges:    0 for a never-routed expert; singular with fewer tokens than D.
    Cost:     E*D*D float64 per layer (64 experts of width 2048: 2 GiB), over all domains together; one product of P*D*D.
    Source:   the X X^T of SVD-LLM, arXiv 2403.07378, per expert as in D2-MoE, arXiv 2502.17298.
    """
    return event.gram(event.in_PD)


@statistic("hidden_gram", axes="EFF", event=RoutedEvent, on_demand=True, inside=True, by_domain=False)
def hidden_gram(event: RoutedEvent) -> Rows:
    """The second moments of an expert's hidden state, for adapters of down that fit its inputs best.

    sum_{t routed to e} h_t h_t^T,  h = what the last product (down) multiplies

    Needs:    routed tokens' hidden states; collected on demand only.
    Shapes:   (E, F, F), symmetric, positive semidefinite.
    Units:    hidden activation squared.
    Edges:    0 for a never-routed expert; singular with fewer tokens than F.
    Cost:     E*F*F float64 per layer, over all domains together; one product of P*F*F.
    Source:   the X X^T of SVD-LLM, arXiv 2403.07378, for the down projection.
    """
    return event.gram(event.hidden_PF)


@statistic("dropped", axes="E", event=SearchEvent, on_demand=True)
def dropped(event: SearchEvent) -> Tensor:
    """Which experts a search over sets of experts removes.

    1 if the search removes e, else 0

    Needs:    a search on the live model (`locum search`); calibration does not give it.
    Shapes:   (E,).
    Units:    0 or 1.
    Edges:    all 0 in a layer that can spare no expert.
    Cost:     thousands of layer outputs on cached tokens, without running an expert again.
    Source:   stage one of MoE-I2, arXiv 2411.01016.
    """
    return event.found["dropped"]


@statistic("pruned_importance", axes="E", event=SearchEvent, on_demand=True)
def pruned_importance(event: SearchEvent) -> Tensor:
    """What each expert is worth to the model that the search left over.

    the error of removing e alone from the pruned model, as the search measured it

    Needs:    a search on the live model (`locum search`); calibration does not give it.
    Shapes:   (E,), at least 0.
    Units:    those of the error that the search measured; comparable within a layer.
    Edges:    0 for an expert that the search removed, and for one that no token misses.
    Cost:     one removal per surviving expert.
    Source:   stage two of MoE-I2, arXiv 2411.01016, which takes importance anew on the pruned model.
    """
    return event.found["pruned_importance"]
