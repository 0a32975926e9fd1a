"""The outputs of all experts of a layer for every token, selected or not.

Letters: T tokens, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.watch import run_experts
from ..stats.events import EveryExpertEvent

CHUNK = 2**24  # numbers in a temporary


def outputs_of_all(experts: nn.Module, x_TD: Tensor) -> Iterator[Tensor]:
    """[T, E, D] outputs of all experts, of some tokens at a time; every expert runs on every token."""
    num_experts = experts.num_experts
    for part_TD in x_TD.split(max(1, CHUNK // (num_experts * x_TD.shape[1]))):
        index_TE = torch.arange(num_experts, device=x_TD.device).expand(len(part_TD), -1)
        event = run_experts(experts, part_TD, index_TE, torch.ones_like(index_TE, dtype=part_TD.dtype))[1]
        yield event.out_PD.view(num_experts, len(part_TD), -1).transpose(0, 1)


def gram_of_outputs(experts: nn.Module, x_TD: Tensor) -> Tensor:
    """[T, E, E] products of the outputs of all experts for every token, in float64."""
    return torch.cat([EveryExpertEvent(out_TED).gram_TEE for out_TED in outputs_of_all(experts, x_TD)])
