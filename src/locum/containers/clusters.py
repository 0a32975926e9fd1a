"""A container's forward, cluster by cluster: where rows are many, where gradients are wanted, and for any number format.

A cluster is a dense row with all the experts that use it, or one expert that has none. Pairs are sorted by cluster, and
each cluster runs from its inputs to its outputs in one go, so that what lies between stays in the processor's cache.
The numbers of rows are those that were routed: nothing is padded.

An expert is a sum of terms, W = dense row + B A. During annealed recovery (LightMoE, arXiv 2603.12645, Eq. 6) a replaced
expert's weights are beta W_old + (1 - beta) W_base + B A: one term more.

Letters: T tokens, M selected experts of a token, P pairs (token, expert), S the pairs of one cluster or expert, U the
units of a cluster (its distinct tokens), E experts, D model width, F expert width, G 2F with a gate and F without, R rank.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..experts.routing import Routed, modulate
from ..kernels import native
from ..kernels.choice import NATIVE
from ..kernels.products import Products
from .layout import Layout
from .low_rank import add_adapters, scatter_adapters

Members = list[tuple[int, slice]]  # experts of a cluster that were selected, and where their pairs are


class Cluster(NamedTuple):
    row: int  # dense row, or -1
    experts: tuple[int, ...]


def clusters_of(layout: Layout) -> tuple[Cluster, ...]:
    """Every expert in one cluster; those without a dense row come last and are alone."""

    def key(e: int) -> int:
        return layout.dense_of[e] if layout.dense_of[e] >= 0 else layout.num_dense + e

    groups = itertools.groupby(sorted(range(layout.num_experts), key=key), key)
    return tuple(Cluster(k if k < layout.num_dense else -1, tuple(experts)) for k, experts in groups)


class Full(NamedTuple):
    """One row of full-rank weights, of biases, or of both."""

    scale: float
    gate_up_GD: Tensor | None
    down_DF: Tensor | None
    gate_up_bias_G: Tensor | None
    down_bias_D: Tensor | None

    def first(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.gate_up_GD is None:
            return self.scaled(self.gate_up_bias_G.expand(len(inputs[0]), -1))
        return self.scaled(halves(inputs, self.gate_up_GD, self.gate_up_bias_G))

    def second(self, hidden_SF: Tensor, gate_S1: Tensor) -> Tensor:
        """Of hidden states that their gates are multiplied into; so the bias is, here."""
        bias_SD = None if self.down_bias_D is None else gate_S1.to(self.down_bias_D.dtype) * self.down_bias_D
        if self.down_DF is None:
            return self.scaled(bias_SD)
        product_SD = linear(hidden_SF, self.down_DF)
        return self.scaled(product_SD if bias_SD is None else product_SD + bias_SD)

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale


class LowRank(NamedTuple):
    """One adapter."""

    gate_up_A: Tensor
    gate_B_FR: Tensor | None
    up_B_FR: Tensor
    down_A_RF: Tensor
    down_B_DR: Tensor

    def first(self, inputs: tuple[Tensor, ...]) -> Tensor:
        low = halves(inputs, self.gate_up_A)
        if self.gate_B_FR is None:
            return linear(low, self.up_B_FR)
        gate_SR, up_SR = low.chunk(2, dim=1)
        return torch.cat([linear(gate_SR, self.gate_B_FR), linear(up_SR, self.up_B_FR)], dim=1)

    def second(self, hidden_SF: Tensor, gate_S1: Tensor) -> Tensor:
        return linear(linear(hidden_SF, self.down_A_RF), self.down_B_DR)


def halves(inputs: tuple[Tensor, ...], weight_GD: Tensor, bias_G: Tensor | None = None) -> Tensor:
    """The first product: of the one input, or of gate's half with the first input and up's with the second."""
    if len(inputs) == 1:
        return linear(inputs[0], weight_GD, bias_G)
    parts = zip(inputs, weight_GD.chunk(2), (None, None) if bias_G is None else bias_G.chunk(2), strict=True)
    return torch.cat([linear(*part) for part in parts], dim=1)


class Terms:
    """The terms of a container's rows and experts. `way`: how adapters over a dense row are made, if all at once."""

    def __init__(self, container: Any, way: Products | None) -> None:
        self.container, self.layout, self.way = container, container.layout, way
        stacks = {"dense": container.dense, "shared": container.shared, "old": container.old}
        stacks |= {"biases": container.biases, **dict(enumerate(container.adapters))}
        # One unbind, not an index per row: its gradient is one stack, where each index would cost a whole one of zeros.
        self.rows = {
            key: {name: parameter.unbind(0) for name, parameter in stack.named_parameters()}
            for key, stack in stacks.items()
            if stack is not None
        }
        self.constants = () if container.constant_ND is None else container.constant_ND.unbind(0)

    def fade(self, e: int) -> float:
        """How far an expert's base, biases and constant have come in for its old weights."""
        return 1 - self.container.beta if self.container.old_of[e] >= 0 else 1.0

    def fades(self, members: Members, gate_S1: Tensor) -> Tensor | None:
        """The same for every pair of a cluster's members; None where it is one for all."""
        if all(self.fade(e) == 1 for e, _ in members):
            return None
        return torch.cat([gate_S1.new_full((part.stop - part.start, 1), self.fade(e)) for e, part in members])

    def constant(self, e: int) -> Tensor | None:
        row = self.layout.constant_of[e]
        return None if row < 0 else self.fade(e) * self.constants[row]

    def base(self, row: int) -> Full | None:
        if row < 0:
            return None
        own = len(self.rows["dense"]["down_NDF"]) if "dense" in self.rows else 0
        return self._full("dense", row) if row < own else self._full("shared", row - own)

    def adapters(self, members: Members) -> list[tuple[nn.Module, Tensor]]:
        """The stacks that members have adapters in, and for every pair its row there or -1."""
        counts = torch.tensor([part.stop - part.start for _, part in members], device="cpu")
        found = []
        for index in sorted({self.layout.rank_of[e] for e, _ in members} - {-1}):
            rows = [self.layout.adapter_of[e] if self.layout.rank_of[e] == index else -1 for e, _ in members]
            found.append((self.container.adapters[index], torch.tensor(rows, device="cpu").repeat_interleave(counts)))
        return found

    def own(self, e: int, adapters: bool = True) -> list[Full | LowRank]:
        """What an expert has beside the dense row of its cluster, its constant left out."""
        terms: list[Full | LowRank] = []
        if (row := self.container.old_of[e]) >= 0:
            terms.append(self._full("old", row, self.container.beta))
        if (row := self.layout.bias_of[e]) >= 0:
            terms.append(self._full("biases", row, self.fade(e)))
        if adapters and (index := self.layout.rank_of[e]) >= 0:
            row = self.layout.adapter_of[e]
            found = {name: rows[row] for name, rows in self.rows[index].items()}
            terms.append(LowRank(**{"gate_B_FR": None, **found}))
        return terms

    def is_compiled(self, base: Full | None, e: int, routed: Routed) -> bool:
        """Whether an expert is nothing but a dense row, all of which the compiled products can do."""
        if self.way is not NATIVE or base is None or self.own(e) or self.fade(e) != 1:
            return False
        (x_TD, *other), dtype = routed.inputs, base.gate_up_GD.dtype
        return base.gate_up_bias_G is None and not other and dtype == x_TD.dtype and self.container.gates_by_swiglu()

    def _full(self, key: str, row: int, scale: float = 1.0) -> Full:
        names = ("gate_up_NGD", "down_NDF", "gate_up_bias_NG", "down_bias_ND")
        return Full(scale, *(self.rows[key][name][row] if name in self.rows[key] else None for name in names))


def forward(container: Any, routed: Routed) -> Tensor:
    """The sum over each token's experts of gate times output [T, D], in float32 at least."""
    x_TD = routed.inputs[0]
    same = all(stack.dtype == x_TD.dtype for stack in container.adapters)
    terms = Terms(container, NATIVE if same and native.serves(x_TD) else None)
    if not len(x_TD):
        return x_TD.clone()  # a sum of nothing that gradients can still be asked of
    place_P = container.table(x_TD.device)[0].index_select(0, routed.index_TM.reshape(-1))
    place_P, order_P = torch.sort(place_P, stable=True)
    token_P, gate_P1 = order_P // routed.index_TM.shape[1], routed.weight_TM.reshape(-1, 1).index_select(0, order_P)
    counts = iter(torch.bincount(place_P, minlength=container.num_experts).tolist())
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    total_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    start = 0
    for row, experts in container.clusters:
        ends = list(itertools.accumulate((next(counts) for _ in experts), initial=0))
        members = [(e, slice(a, b)) for e, (a, b) in zip(experts, itertools.pairwise(ends), strict=True) if a < b]
        here = slice(start, start := start + ends[-1])
        if members:
            _add_outputs(total_TD, terms, row, members, routed, token_P[here], gate_P1[here])
    return total_TD


def _add_outputs(
    total_TD: Tensor, terms: Terms, row: int, members: Members, routed: Routed, token_S: Tensor, gate_S1: Tensor
) -> None:
    """What each token gets of one cluster."""
    norm = terms.container.post_expert_norm
    if norm is None:
        _add_products(total_TD, terms, row, members, routed, token_S, gate_S1)
    else:  # outputs are normed one by one, so nothing can be summed before
        each_S = torch.arange(len(token_S), device=token_S.device)
        out_SD = total_TD.new_zeros(len(token_S), total_TD.shape[1])
        _add_products(out_SD, terms, row, members, routed.of(token_S), each_S, torch.ones_like(gate_S1))
        _add(total_TD, terms, token_S, norm(out_SD.to(routed.inputs[0].dtype)) * gate_S1)
    for e, part in members:
        if (constant_D := terms.constant(e)) is not None:
            _add(total_TD, terms, token_S[part], gate_S1[part] * constant_D)


def _add(total_TD: Tensor, terms: Terms, token_S: Tensor, out_SD: Tensor) -> None:
    if terms.way is NATIVE and out_SD.dtype in native.FORMATS:
        native.spread_(total_TD, out_SD, token_S)
    else:
        total_TD.index_add_(0, token_S, out_SD.to(total_TD.dtype))


def _add_products(
    total_TD: Tensor, terms: Terms, row: int, members: Members, routed: Routed, token_S: Tensor, gate_S1: Tensor
) -> None:
    """The products of one cluster: with its dense row once per token, with what its members have of their own per pair."""
    base = terms.base(row)
    if len(members) == 1 and terms.is_compiled(base, members[0][0], routed):
        item_S = torch.zeros_like(token_S)
        hidden_SF = native.gated(routed.inputs[0], base.gate_up_GD[None], gate_S1, item_S, token_S)
        if routed.down_TF is not None:
            hidden_SF = modulate(hidden_SF, routed.down_TF[token_S])
        return native.scatter_(total_TD, hidden_SF, base.down_DF[None], item_S, token_S)
    each_S = torch.arange(len(token_S), device=token_S.device)
    adapters = terms.adapters(members) if base is not None and terms.way is not None else []
    own = {e: terms.own(e, adapters=not adapters) for e, _ in members}
    if base is None and not any(own.values()):
        return
    pre_SG: Tensor | None = None
    if base is not None:
        token_U, unit_S, fade_S1 = token_S, None, terms.fades(members, gate_S1)
        if len(members) > 1:
            token_U, unit_S = torch.unique(token_S, return_inverse=True)
        pre_UG = base.first(tuple(x_TD.index_select(0, token_U) for x_TD in routed.inputs))
        pre_SG = faded(pre_UG if unit_S is None else pre_UG.index_select(0, unit_S), fade_S1)
    for stack, row_S in adapters:
        add_adapters(terms.way, pre_SG, routed.inputs, token_S, stack, row_S, each_S)
    if any(own.values()):
        inputs = tuple(x_TD.index_select(0, token_S) for x_TD in routed.inputs)
        rows = []
        for e, part in members:
            whole = [] if pre_SG is None else [pre_SG[part]]
            more = [term.first(tuple(x_SD[part] for x_SD in inputs)) for term in own[e]]
            rows.append(functools.reduce(torch.add, whole + more))
        pre_SG = torch.cat(rows) if len(rows) > 1 else rows[0]
    hidden_SF = terms.container.hidden(pre_SG, gate_S1, terms.way is NATIVE)
    if routed.down_TF is not None:
        hidden_SF = modulate(hidden_SF, routed.down_TF[token_S])
    for stack, row_S in adapters:
        scatter_adapters(terms.way, total_TD, hidden_SF, token_S, stack, row_S, each_S)
    for e, part in members:
        for term in own[e]:
            _add(total_TD, terms, token_S[part], term.second(hidden_SF[part], gate_S1[part]))
    if base is not None:
        hidden_SF, gate_S1 = faded(hidden_SF, fade_S1), faded(gate_S1, fade_S1)
        if unit_S is not None:
            hidden_SF, gate_S1 = (
                x.new_zeros(len(token_U), x.shape[1]).index_add_(0, unit_S, x) for x in (hidden_SF, gate_S1)
            )
        _add(total_TD, terms, token_U, base.second(hidden_SF, gate_S1))


def faded(x: Tensor, fade_S1: Tensor | None) -> Tensor:
    return x if fade_S1 is None else x * fade_S1.to(x.dtype)
