"""The one experts module for everything the stock layout cannot hold: shared bases, adapters, constants, nothing.

It is called exactly like a stock experts module, `container(x [T, D], top_k_index [T, K], top_k_weights [T, K])`, and
computes for every selected expert  W_down [act(W_gate x) * (W_up x)] + c  with  W = dense row + B A  (design.md 1.3).

Work on a dense row is shared by all the experts that use it. For a token, the products of gate and up with a base are
computed once however many of the base's members are selected, and so is the down projection, applied to the sum of
their gate-weighted hidden states. Low-rank parts are added around them, per expert.

Where a layer has a routing policy (routing.py), it decides first which of the selected experts run, and on which inputs:
one for each token, so that the sharing above stays. With vectors of their own for gate and up, the first product of a
weight is made in two halves, one for each input.

During annealed recovery (LightMoE, arXiv 2603.12645, Eq. 6) a replaced expert's weights are
beta W_old + (1 - beta) W_base + B A; each projection is linear, so the three terms are computed and added.

Letters: T tokens, K top-k, P selected (token, expert) pairs, U units (distinct token and dense row), E experts,
N stacked items, D model width, F expert width, G 2F with a gate and F without, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layout import Layout
from .routing import Routed, modulate, route


def grouped_linear(x_PI: Tensor, weight_NOI: Tensor | tuple[Tensor, ...], counts: list[int]) -> Tensor:
    """Rows of `x`, sorted by item, each times its item's weight: the first counts[0] rows use weight[0], and so on."""
    # One unbind, not an index per item: its gradient is one stack, where each index would cost a whole tensor of zeros.
    weights = weight_NOI.unbind(0) if isinstance(weight_NOI, Tensor) else weight_NOI
    parts = [
        functional.linear(x, w_OI) for x, w_OI in zip(torch.split(x_PI, counts), weights, strict=True) if x.shape[0]
    ]
    return torch.cat(parts) if parts else x_PI.new_zeros(0, weights[0].shape[0])


def grouped_first(inputs: tuple[Tensor, ...], token_P: Tensor, weight_NOI: Tensor, counts: list[int]) -> Tensor:
    """The first product for these tokens: of the one input, or of gate's half of each weight with the first input and
    up's half with the second."""
    if len(inputs) == 1:
        return grouped_linear(inputs[0][token_P], weight_NOI, counts)
    halves = weight_NOI.unflatten(1, (2, -1)).flatten(0, 1).unbind(0)  # gate and up of each item in turn
    parts = [grouped_linear(x_TD[token_P], halves[i::2], counts) for i, x_TD in enumerate(inputs)]
    return torch.cat(parts, dim=1)


class Stack(nn.Module):
    """Parameters side by side along the first axis; what they mean is the container's business."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))

    @classmethod
    def holding(cls, tensors: dict[str, Tensor]) -> Stack:
        """A stack of these very tensors, frozen."""
        stack = cls({}, torch.float32, "cpu")
        for name, tensor in tensors.items():
            stack.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return stack


class StandInExperts(nn.Module):
    """The container of one layer.

    `apply_gate` maps the first product [P, G], gate columns first, to hidden states [P, F]; it is the family's own.
    Only while recovery trains it, `shared` holds the last dense rows (the bases), so that they can be trained while the
    experts' own rows are frozen; and `old` (with `old_of`, a row per expert or -1) and `beta` fade out the old weights.
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

    def extra_repr(self) -> str:
        layout = self.layout
        policy = f", routing=({layout.routing})" if layout.routing else ""
        return f"experts={layout.num_experts}, dense={layout.num_dense}, ranks={layout.ranks}{policy}"

    def forward(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed = self._routed(x_TD, top_k_index, top_k_weights)
        expert_P, order = torch.sort(routed.index_TM.reshape(-1), stable=True)
        token_P = order // routed.index_TM.shape[1]
        gate_P = routed.weight_TM.reshape(-1)[order]
        wide = torch.promote_types(x_TD.dtype, torch.float32)  # in which contributions are summed
        fade_P = self._fade(expert_P, wide)
        if self.post_expert_norm is None:
            total_TD = self._products(routed, expert_P, token_P, gate_P, fade_P)
        else:  # outputs are normed one by one, so nothing can be summed before
            pair_P, one_P = torch.arange(len(token_P), device=token_P.device), torch.ones_like(gate_P)
            out_PD = self._products(routed.of(token_P), expert_P, pair_P, one_P, fade_P)
            out_PD = self.post_expert_norm(out_PD.to(x_TD.dtype)) * gate_P[:, None]
            total_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device).index_add(0, token_P, out_PD.to(wide))
        if self.constant_ND is not None:
            row_P = self._rows(self.layout.constant_of, expert_P)
            chosen = (row_P >= 0).nonzero().squeeze(1)
            values = self.constant_ND[row_P[chosen]].to(wide) * gate_P[chosen, None]
            if fade_P is not None:
                values = values * fade_P[chosen, None]
            total_TD = total_TD.index_add(0, token_P[chosen], values.to(wide))
        return total_TD.to(x_TD.dtype)

    def _routed(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        if self.layout.routing is None:
            return Routed(index_TK, weight_TK, (x_TD,))
        return route(self.layout.routing, self.offsets_NV, x_TD, index_TK, weight_TK, self.layout.has_gate)

    def _products(
        self, routed: Routed, expert_P: Tensor, token_P: Tensor, gate_P: Tensor, fade_P: Tensor | None
    ) -> Tensor:
        """The sum over a token's pairs of gate times expert output, constants left out."""
        x_TD = routed.inputs[0]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        pre_PG = x_TD.new_zeros(expert_P.shape[0], self._first_width)
        parts = [*self._dense_parts(expert_P, token_P, fade_P), *self._own_parts(expert_P, token_P, wide)]
        if self.biases is not None:
            parts.append(_Biases(self.biases, self._rows(self.layout.bias_of, expert_P), token_P, fade_P))
        for part in parts:
            pre_PG = part.add_first(pre_PG, routed.inputs)
        hidden_PF = self.apply_gate(pre_PG) * gate_P[:, None].to(pre_PG.dtype)
        if routed.down_TF is not None:
            hidden_PF = modulate(hidden_PF, routed.down_TF[token_P])
        for part in parts:
            total_TD = part.add_second(total_TD, hidden_PF, gate_P)
        return total_TD

    @property
    def _first_width(self) -> int:
        return self.layout.expert_width * (2 if self.layout.has_gate else 1)

    def _rows(self, row_of: tuple[int, ...], expert_P: Tensor) -> Tensor:
        return torch.tensor(row_of, device=expert_P.device)[expert_P]

    def _fade(self, expert_P: Tensor, dtype: torch.dtype) -> Tensor | None:
        """How far each pair's base and constant have come in for the old weights: 1 - beta, or 1 if it has none."""
        if self.old is None:
            return None
        fading_P = self._rows(self.old_of, expert_P) >= 0
        return torch.ones(fading_P.shape, dtype=dtype, device=fading_P.device).masked_fill(fading_P, 1 - self.beta)

    def _dense_parts(self, expert_P: Tensor, token_P: Tensor, fade_P: Tensor | None) -> list[_Dense]:
        row_P = self._rows(self.layout.dense_of, expert_P)
        if self.shared is None:
            return [] if self.dense is None else [_Dense(self.dense, row_P, token_P, fade_P)]
        if self.dense is None:
            return [_Dense(self.shared, row_P, token_P, fade_P)]
        first = self.dense.down_NDF.shape[0]
        own = _Dense(self.dense, torch.where(row_P < first, row_P, -1), token_P, fade_P)
        return [own, _Dense(self.shared, row_P - first, token_P, fade_P)]

    def _own_parts(self, expert_P: Tensor, token_P: Tensor, dtype: torch.dtype) -> list[_Dense | _LowRank]:
        parts: list[_Dense | _LowRank] = []
        if self.old is not None:
            row_P = self._rows(self.old_of, expert_P)
            parts.append(_Dense(self.old, row_P, token_P, torch.full_like(row_P, self.beta, dtype=dtype)))
        for index, stack in enumerate(self.adapters):
            rows = zip(self.layout.rank_of, self.layout.adapter_of, strict=True)
            row_P = self._rows(tuple(a if r == index else -1 for r, a in rows), expert_P)
            parts.append(_LowRank(stack, row_P, token_P))
        return parts


class _Dense:
    """Full-rank products for the pairs whose expert has a dense row, once per distinct (row, token)."""

    def __init__(self, stack: Stack, row_P: Tensor, token_P: Tensor, scale_P: Tensor | None) -> None:
        self.stack = stack
        self.pair_S = (row_P >= 0).nonzero().squeeze(1)
        num_tokens = int(token_P.max()) + 1 if token_P.numel() else 1
        key_S = row_P[self.pair_S] * num_tokens + token_P[self.pair_S]
        key_U, self.unit_S = torch.unique(key_S, return_inverse=True)
        self.token_U = key_U % num_tokens
        self.row_U = key_U // num_tokens
        self.counts = torch.bincount(self.row_U, minlength=stack.down_NDF.shape[0]).tolist()
        self.scale_S = None if scale_P is None else scale_P[self.pair_S, None]

    def add_first(self, pre_PG: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        product_UG = grouped_first(inputs, self.token_U, self.stack.gate_up_NGD, self.counts)
        if hasattr(self.stack, "gate_up_bias_NG"):
            product_UG = product_UG + self.stack.gate_up_bias_NG[self.row_U]
        return pre_PG.index_add(0, self.pair_S, self._scaled(product_UG[self.unit_S]).to(pre_PG.dtype))

    def add_second(self, total_TD: Tensor, hidden_PF: Tensor, gate_P: Tensor) -> Tensor:
        hidden_SF = self._scaled(hidden_PF[self.pair_S])
        hidden_UF = hidden_SF.new_zeros(self.token_U.shape[0], hidden_SF.shape[1]).index_add(0, self.unit_S, hidden_SF)
        product_UD = grouped_linear(hidden_UF, self.stack.down_NDF, self.counts).to(total_TD.dtype)
        if hasattr(self.stack, "down_bias_ND"):
            gate_S1 = self._scaled(gate_P[self.pair_S, None].to(total_TD.dtype))
            mass_U1 = gate_S1.new_zeros(self.token_U.shape[0], 1).index_add(0, self.unit_S, gate_S1)
            product_UD = product_UD + mass_U1 * self.stack.down_bias_ND[self.row_U].to(total_TD.dtype)
        return total_TD.index_add(0, self.token_U, product_UD)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale_S is None else x * self.scale_S.to(x.dtype)


class _LowRank:
    """Products with adapters of one rank, for the pairs whose expert has one."""

    def __init__(self, stack: Stack, row_P: Tensor, token_P: Tensor) -> None:
        self.stack = stack
        chosen = (row_P >= 0).nonzero().squeeze(1)
        # Rows follow expert order inside one rank, so the pairs are sorted by row already; sorting keeps that explicit.
        row_S, order = torch.sort(row_P[chosen], stable=True)
        self.pair_S = chosen[order]
        self.token_S = token_P[self.pair_S]
        self.counts = torch.bincount(row_S, minlength=stack.down_B_DR.shape[0]).tolist()

    def add_first(self, pre_PG: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        low = grouped_first(inputs, self.token_S, self.stack.gate_up_A, self.counts)
        if hasattr(self.stack, "gate_B_FR"):
            gate_low, up_low = low.chunk(2, dim=1)
            gate = grouped_linear(gate_low, self.stack.gate_B_FR, self.counts)
            product = torch.cat([gate, grouped_linear(up_low, self.stack.up_B_FR, self.counts)], dim=1)
        else:
            product = grouped_linear(low, self.stack.up_B_FR, self.counts)
        return pre_PG.index_add(0, self.pair_S, product.to(pre_PG.dtype))

    def add_second(self, total_TD: Tensor, hidden_PF: Tensor, gate_P: Tensor) -> Tensor:
        low = grouped_linear(hidden_PF[self.pair_S], self.stack.down_A_RF, self.counts)
        product = grouped_linear(low, self.stack.down_B_DR, self.counts)
        return total_TD.index_add(0, self.token_S, product.to(total_TD.dtype))


class _Biases:
    """Biases of their own for the pairs whose expert has an adapter and nothing else to take them from."""

    def __init__(self, stack: Stack, row_P: Tensor, token_P: Tensor, scale_P: Tensor | None) -> None:
        self.stack = stack
        self.pair_S = (row_P >= 0).nonzero().squeeze(1)
        self.row_S = row_P[self.pair_S]
        self.token_S = token_P[self.pair_S]
        self.scale_S = None if scale_P is None else scale_P[self.pair_S, None]

    def add_first(self, pre_PG: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return pre_PG.index_add(0, self.pair_S, self._scaled(self.stack.gate_up_bias_NG[self.row_S]).to(pre_PG.dtype))

    def add_second(self, total_TD: Tensor, hidden_PF: Tensor, gate_P: Tensor) -> Tensor:
        bias_SD = self._scaled(self.stack.down_bias_ND[self.row_S]).to(total_TD.dtype)
        return total_TD.index_add(0, self.token_S, bias_SD * gate_P[self.pair_S, None].to(total_TD.dtype))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale_S is None else x * self.scale_S.to(x.dtype)
