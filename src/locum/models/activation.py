"""A family's own activation, as a function that outlives the experts it came from and goes through pickle.

Letters: P pairs (token, expert), F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Activation:
    """Hidden states [P, F] of first products [P, G] with all gate columns before all up columns.

    It works on a copy of the stock experts without weights and norm, so that holding it holds no memory.
    """

    def __init__(self, experts: nn.Module) -> None:
        self.shell = copy.copy(experts)
        self.shell._parameters = {}
        self.shell._modules = {name: m for name, m in experts._modules.items() if name != "post_expert_norm"}

    def __call__(self, pre_PG: Tensor) -> Tensor:
        if not self.shell.has_gate:
            return self.shell.act_fn(pre_PG)
        if not self.shell.is_concatenated:
            pre_PG = torch.stack(pre_PG.chunk(2, dim=-1), dim=-1).flatten(-2)
        return self.shell._apply_gate(pre_PG)
