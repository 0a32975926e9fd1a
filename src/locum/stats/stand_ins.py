"""Statistics that trying stand-ins on the model finds: what each candidate for an expert costs, and what a layer's errors cost.

Letters: E experts, C candidates.
"""

from __future__ import annotations

from torch import Tensor

from .definitions import statistic
from .events import SearchEvent

CANDIDATES = 32  # places of a layer's candidates (budgets/candidates.py); those that it has none for are infinite


@statistic("candidate_error", axes="EC", event=SearchEvent, on_demand=True)
def candidate_error(event: SearchEvent) -> Tensor:
    """What a layer's output loses where one expert becomes a candidate: bits, low rank, a base, a constant, nothing, dropped.

    sum over the sample's tokens that are routed to e of g^2 |f_e(x) - f'_e(x)|^2;  of a dropped expert |F(x) - F_without(x)|^2 over all
    tokens, the router run anew

    Needs:    a search on the live model (`locum search --method auto`); calibration does not give it.
    Shapes:   (E, C), in the order of budgets/candidates.py.
    Units:    hidden state squared, summed over the sample; comparable within a layer.
    Edges:    infinite where a layer has no such candidate; 0 for an expert that the sample never selects.
    Cost:     every candidate is built as a plan would have it, and run on the sample's pairs.
    Source:   not from a paper.
    """
    return event.found["candidate_error"]


@statistic("candidate_loss", axes="C", event=SearchEvent, on_demand=True)
def candidate_loss(event: SearchEvent) -> Tensor:
    """What the model loses where all experts of a layer become a candidate, so that errors of different kinds compare.

    KL(model || model in which every expert of the layer is that), the mean over tokens

    Needs:    a search on the live model (`locum search --method auto`); calibration does not give it.
    Shapes:   (C,), in the order of budgets/candidates.py.
    Units:    nats per token.
    Edges:    infinite where it was not measured: of a candidate that a layer lacks, of dropping, and with other prices.
    Cost:     a pass of the model over the sample for each candidate of each layer; of a streamed one, the checkpoint is read once for each
              layer, or for as many candidates as have room for their hidden states.
    Source:   not from a paper.
    """
    return event.found["candidate_loss"]


@statistic("error_price", axes="", event=SearchEvent, on_demand=True)
def error_price(event: SearchEvent) -> Tensor:
    """What a unit of error in a layer's output costs the model, so that errors of different layers compare.

    KL(model || model with noise in the layer's output), the mean over tokens, divided by the sum of the noise's squares

    Needs:    a search on the live model (`locum search --method auto`); calibration does not give it.
    Shapes:   a single number.
    Units:    nats per token, for each unit of `candidate_error`; with `--price output` shares of the layer's own output.
    Edges:    0 where the layer gives nothing.
    Cost:     one pass of the model over the sample for each layer.
    Source:   not from a paper.
    """
    return event.found["error_price"]
