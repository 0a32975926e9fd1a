"""The one experts module for everything the stock layout cannot hold: shared bases, adapters, constants, nothing.

It is called exactly like a stock experts module, `container(x [T, D], top_k_index [T, K], top_k_weights [T, K])`, and
computes for every selected expert  W_down [act(W_gate x) * (W_up x)] + c  with  W = dense row + B A  (design.md 1.3).

Work on a dense row is shared by all the experts that use it. For a token, the products of gate and up with a base are
computed once however many of the base's members are selected, and so is the down projection, applied to the sum of
their gate-weighted hidden states. Low-rank parts are added around them, per expert.

There are two ways through it, and `kernels.choice` takes one by shape: all pairs at once, with shapes that do not
depend on what was routed (here), and cluster by cluster (clusters.py), which alone knows what recovery adds.

Where a layer has a routing policy (routing.py), it decides first which of the selected experts run, and on which inputs:
one for each token, so that the sharing above stays. With vectors of their own for gate and up, the first product of a
weight is made in two halves, one for each input.

Letters: T tokens, K top-k, M main, P selected (token, expert) pairs, E experts, N stacked items, D model width, F expert
width, G 2F with a gate and F without, R rank, X parts (the stacks that an expert may have a row of).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..experts.routing import Routed, modulate, route
from ..kernels import choice, native
from ..kernels.grouped import pick
from ..kernels.products import Products
from . import clusters
from .layout import Layout
from .low_rank import add_adapters, add_first, scatter_adapters
from .stack import Stack


def is_swiglu(apply_gate: Callable[[Tensor], Tensor]) -> bool:
    """Whether a gate is silu(gate) * up: tried on numbers of every size, since some families clamp or shift them."""
    generator = torch.Generator().manual_seed(0)
    sizes_P1 = torch.logspace(-3, 4, 64, device="cpu")[:, None]
    probe_PG = torch.randn(64, 64, generator=generator, device="cpu") * sizes_P1
    gate_PF, up_PF = probe_PG.chunk(2, dim=1)
    return torch.allclose(apply_gate(probe_PG), functional.silu(gate_PF) * up_PF, rtol=1e-5, atol=0)


class StandInExperts(nn.Module):
    """The container of one layer.

    `apply_gate` maps the first product [P, G], gate columns first, to hidden states [P, F]; it is the family's own.
    Only while recovery trains it, `shared` holds the last dense rows (the bases), so that they can be trained while the
    experts' own rows are frozen; and `old` (with `old_of`, a row per expert or -1) and `beta` fade out the old weights.
    `way` takes the place of what `kernels.choice` says, for measurements.
    """

    def __init__(
        self, layout: Layout, apply_gate: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layout = layout
        self.num_experts = layout.num_experts
        self.apply_gate = apply_gate
        stacks: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in layout.tensor_shapes().items():
            stack, _, leaf = name.rpartition(".")
            stacks.setdefault(stack, {})[leaf] = shape
        self.dense = Stack(stacks["dense"], dtype, device) if "dense" in stacks else None
        self.adapters = nn.ModuleList(Stack(stacks[f"adapters.{i}"], dtype, device) for i in range(len(layout.ranks)))
        self.biases = Stack(stacks["biases"], dtype, device) if "biases" in stacks else None
        for name in ("constant_ND", "offsets_NV"):
            shape = stacks.get("", {}).get(name)
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            self.register_parameter(name, parameter)
        self.post_expert_norm: nn.Module | None = (
            None  # the family's own, applied to an expert's output before its gate
        )
        self.shared: Stack | None = None
        self.old: Stack | None = None
        self.old_of: tuple[int, ...] = (-1,) * layout.num_experts
        self.beta = 0.0
        self.way: str | None = None
        self.clusters = clusters.clusters_of(layout)
        # No buffer: from_pretrained overwrites those that are in no file.
        self._table_XE = torch.tensor(self._places(), device="cpu")
        self._low_rank = (
            2 * sum(r >= 0 > d for d, r in zip(layout.dense_of, layout.rank_of, strict=True)) > self.num_experts
        )
        self._is_swiglu: bool | None = None  # not known yet
        self._aligned = all(shape[-1] % 8 == 0 for shape in layout.tensor_shapes().values())

    def extra_repr(self) -> str:
        layout = self.layout
        policy = f", routing=({layout.routing})" if layout.routing else ""
        return f"experts={layout.num_experts}, dense={layout.num_dense}, ranks={layout.ranks}{policy}"

    def forward(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed = self._routed(x_TD, top_k_index, top_k_weights)
        way = choice.LOOP
        if self.shared is None and self.old is None and all(stack.dtype == x_TD.dtype for stack in self._stacks()):
            pairs = routed.index_TM.numel()
            way = self.way or choice.choose(
                x_TD.device, x_TD.dtype, pairs, self.num_experts, self._aligned, self._low_rank
            )
        if way == choice.LOOP:
            return clusters.forward(self, routed).to(x_TD.dtype)
        return self._at_once(routed, choice.PRODUCTS[way]()).to(x_TD.dtype)

    def _routed(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        if self.layout.routing is None:
            return Routed(index_TK, weight_TK, (x_TD,))
        return route(self.layout.routing, self.offsets_NV, x_TD, index_TK, weight_TK, self.layout.has_gate)

    def hidden(self, pre_PG: Tensor, gate_P1: Tensor, compiled: bool) -> Tensor:
        """Hidden states [P, F] of first products, gates multiplied in; by the compiled products, if they know how."""
        if compiled and self.gates_by_swiglu():
            return native.swiglu(pre_PG, gate_P1)
        return self.apply_gate(pre_PG) * gate_P1.to(pre_PG.dtype)

    def gates_by_swiglu(self) -> bool:
        """Whether the family's gate is silu(gate) * up, which the compiled products know; tried once."""
        if self._is_swiglu is None:
            self._is_swiglu = self.layout.has_gate and is_swiglu(self.apply_gate)
        return self._is_swiglu

    def _places(self) -> list[tuple[int, ...]]:
        """Per expert: its place in the order of the clusters, its dense row, constant and bias, its row in each adapter."""
        order = [e for cluster in self.clusters for e in cluster.experts]
        layout = self.layout
        adapters = [
            tuple(row if r == index else -1 for r, row in zip(layout.rank_of, layout.adapter_of, strict=True))
            for index in range(len(layout.ranks))
        ]
        place = tuple(order.index(e) for e in range(layout.num_experts))
        return [place, layout.dense_of, layout.constant_of, layout.bias_of, *adapters]

    def table(self, device: torch.device) -> Tensor:
        """What `_places` says, kept where it was last needed."""
        if self._table_XE.device != device:
            self._table_XE = torch.tensor(self._places(), device=device)
        return self._table_XE

    def _stacks(self) -> list[Stack]:
        return [*(stack for stack in (self.dense, self.biases) if stack is not None), *self.adapters]

    def _at_once(self, routed: Routed, way: Products) -> Tensor:
        """All pairs at once. Nothing waits for what was routed, and no shape depends on it."""
        x_TD, num_main = routed.inputs[0], routed.index_TM.shape[1]
        _, dense_P, constant_P, bias_P, *adapter_XP = self.table(x_TD.device)[:, routed.index_TM.reshape(-1)].unbind(0)
        token_P = torch.arange(len(dense_P), device=x_TD.device).div(num_main, rounding_mode="floor")
        gate_P1 = routed.weight_TM.reshape(-1, 1)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        rows = (dense_P, bias_P, *adapter_XP)
        if self.post_expert_norm is None:
            self._add_products(total_TD, routed, rows, token_P, gate_P1, way)
        else:  # outputs are normed one by one, so nothing can be summed before
            out_PD = total_TD.new_zeros(len(token_P), x_TD.shape[1])
            each_P = torch.arange(len(token_P), device=x_TD.device)
            self._add_products(out_PD, routed.of(token_P), rows, each_P, torch.ones_like(gate_P1), way)
            total_TD.index_add_(0, token_P, (self.post_expert_norm(out_PD.to(x_TD.dtype)) * gate_P1).to(wide))
        if self.constant_ND is not None:
            total_TD.index_add_(0, token_P, pick(self.constant_ND, constant_P).to(wide) * gate_P1.to(wide))
        return total_TD

    def _add_products(
        self,
        total_TD: Tensor,
        routed: Routed,
        rows: tuple[Tensor, ...],
        token_P: Tensor,
        gate_P1: Tensor,
        way: Products,
    ) -> None:
        """Add to each token its pairs' gates times outputs, constants left out."""
        dense_P, bias_P, *adapter_XP = rows
        f, each_P = self.layout.expert_width, torch.arange(len(token_P), device=token_P.device)
        pre_PG = routed.inputs[0].new_zeros(len(token_P), f * (2 if self.layout.has_gate else 1))
        biased = [(self.dense, dense_P), (self.biases, bias_P)] if self.layout.has_bias else []
        biased = [(stack, row_P) for stack, row_P in biased if stack is not None]
        if self.dense is not None:
            add_first(way, pre_PG, routed.inputs, token_P, self.dense.gate_up_NGD, dense_P)
        for stack, row_P in zip(self.adapters, adapter_XP, strict=True):
            add_adapters(way, pre_PG, routed.inputs, token_P, stack, row_P, each_P)
        for stack, row_P in biased:
            pre_PG += pick(stack.gate_up_bias_NG, row_P)
        hidden_PF = self.hidden(pre_PG, gate_P1, way is choice.NATIVE)
        if routed.down_TF is not None:
            hidden_PF = modulate(hidden_PF, routed.down_TF[token_P])
        if self.dense is not None:
            way.scatter(total_TD, hidden_PF, self.dense.down_NDF, dense_P, token_P)
        for stack, row_P in zip(self.adapters, adapter_XP, strict=True):
            scatter_adapters(way, total_TD, hidden_PF, token_P, stack, row_P, each_P)
        for stack, row_P in biased:
            bias_PD = pick(stack.down_bias_ND, row_P).to(total_TD.dtype) * gate_P1.to(total_TD.dtype)
            total_TD.index_add_(0, token_P, bias_PD)
