"""A container's forward, cluster by cluster: where rows are many, where gradients are wanted, and for any kind of part.

A cluster is a dense row with all the experts that use it, or one expert that has none. Pairs are sorted by cluster. Each
cluster runs from its inputs to its outputs in one go, so that intermediate results stay in the processor's cache. The
numbers of rows are those that were routed: nothing is padded.

Letters: T tokens, M experts of a token that may run, P pairs (token, expert), Q pairs of one cluster or expert, U the
distinct tokens of a cluster, E experts, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.part import Part
from ..experts.policies.policy import Routed, modulate
from ..kernels import native
from ..kernels.choice import NATIVE
from ..kernels.products import Products
from .layout import Layout, StackLayout
from .stack import Matrices, Row, as_numbers, keeping_bytes

Rows = Mapping[str, Matrices | tuple[Tensor, ...]]  # of every tensor of a stack


class Cluster(NamedTuple):
    row: int  # dense row, or -1
    experts: tuple[int, ...]


class Selected(NamedTuple):
    """An expert of a cluster that was selected, and where its pairs are."""

    expert: int
    pairs: slice


def clusters_of(layout: Layout) -> tuple[Cluster, ...]:
    """Every expert in one cluster; those without a dense row come last and are alone."""

    def key(e: int) -> int:
        return layout.dense_of[e] if layout.dense_of[e] >= 0 else layout.num_dense + e

    groups = itertools.groupby(sorted(range(layout.num_experts), key=key), key)
    return tuple(Cluster(k if k < layout.num_dense else -1, tuple(experts)) for k, experts in groups)


class Term(NamedTuple):
    """One part of one expert, at a scale."""

    kind: type[Part]
    row: Row
    scale: float = 1.0

    def first(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        with keeping_bytes(self.row):
            return self._scaled(self.kind.first(self.row, inputs))

    def second(self, hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor | None:
        with keeping_bytes(self.row):
            return self._scaled(self.kind.second(self.row, hidden_QF, weight_Q1))

    def _scaled(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.scale == 1 else x * self.scale


class Container(Protocol):
    """What is asked of the module whose forward this is."""

    layout: Layout
    clusters: tuple[Cluster, ...]
    post_expert_norm: nn.Module | None
    paths: list[tuple[str, StackLayout]]

    policy_tensors: tuple[str, ...]

    def stack(self, path: str) -> nn.Module: ...

    def held(self) -> dict[str, Any]: ...

    def table(self, device: torch.device) -> Tensor: ...

    def hidden(self, pre_PG: Tensor, weight_P1: Tensor, compiled: bool) -> Tensor: ...

    def is_compiled_activation(self) -> bool: ...


def _dtype_of_products(x_TD: Tensor) -> torch.dtype:
    """In which inputs are multiplied: numbers that are made of bytes are made so, that autograd keeps no cast ones beside them."""
    device = x_TD.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
    return torch.get_autocast_dtype(device) if is_cast else x_TD.dtype


class Terms:
    """The terms of a container's rows and experts. `way`: how parts over a dense row are made, if all at once."""

    def __init__(self, container: Container, x_TD: Tensor) -> None:
        self.container, self.layout, self.held = container, container.layout, container.held()
        same = all(container.stack(path).dtype == x_TD.dtype for path, _ in self._beside_dense())
        self.way: Products | None = NATIVE if same and native.serves(x_TD) else None
        dtype = _dtype_of_products(x_TD)
        self.rows = [(stack, self._rows_of(path, stack, dtype)) for path, stack in container.paths]
        self.rows.sort(key=lambda pair: not pair[0].kind.fades_in)
        self._shared = {id(stack): self.layout.shared_by(stack) for stack, _ in self.rows if stack.kind.shares}
        self._rows_by = {id(stack): rows for stack, rows in self.rows}

    def _rows_of(self, path: str, stack: StackLayout, dtype: torch.dtype) -> Rows:
        shapes = stack.kind.tensors(stack.variant, self.layout)
        rows = {leaf: as_numbers(getattr(self.held[path], leaf), stack.format, x, dtype) for leaf, x in shapes.items()}
        # One unbind, not an index per row: its gradient is one stack, where each index would cost a whole one of zeros.
        return {leaf: x if isinstance(x, Matrices) else x.unbind(0) for leaf, x in rows.items()}

    def _beside_dense(self) -> list[tuple[str, StackLayout]]:
        """Stacks of parts that are added over a dense row by grouped products."""
        return [(path, stack) for path, stack in self.container.paths if self._is_beside(stack)]

    def _is_beside(self, stack: StackLayout) -> bool:
        return stack.part != OwnWeights.name and stack.kind.has_products and not stack.format

    def anything(self) -> Iterator[Tensor]:
        """A piece of every tensor that these terms are made of, whatever was routed."""
        stacked = (x for _, rows in self.rows for x in rows.values() if not isinstance(x, Matrices))
        yield from (tensors[0] for tensors in stacked if tensors)
        yield from (getattr(self.container, name) for name in self.container.policy_tensors)

    def fade(self, e: int) -> float:
        """How far an expert's parts have come in for its old weights: all the way, where nothing is annealed."""
        return 1.0

    def fades(self, members: list[Selected], weight_Q1: Tensor) -> Tensor | None:
        """The same for every pair of a cluster's members; None where it is one for all."""
        if all(self.fade(e) == 1 for e, _ in members):
            return None
        return torch.cat([weight_Q1.new_full((at.stop - at.start, 1), self.fade(e)) for e, at in members])

    def base(self, row: int) -> Term | None:
        """The dense row of a cluster."""
        if row < 0:
            return None
        for stack, rows in self.rows:  # of each format a stack of its own: their rows are counted through
            if stack.part == OwnWeights.name:
                if row < stack.num_rows:
                    return Term(OwnWeights, Row(rows, row))
                row -= stack.num_rows
        raise IndexError(f"no dense row {row}")

    def constants(self, e: int) -> list[Tensor]:
        found = []
        for term in self.own(e):
            if (constant_D := term.kind.output(term.row)) is not None:
                found.append(term.scale * constant_D)
        return found

    def grouped(self, members: list[Selected]) -> list[tuple[type[Part], Any, Tensor]]:
        """Stacks with grouped products that members have rows of, and for every pair its row there or -1."""
        counts = torch.tensor([at.stop - at.start for _, at in members], device="cpu")
        found = []
        for path, stack in self._beside_dense():
            rows = [stack.rows[e] for e, _ in members]
            if stack.kind.at_once and max(rows) >= 0:
                found.append((stack.kind, self.held[path], torch.tensor(rows, device="cpu").repeat_interleave(counts)))
        return found

    def own(self, e: int, grouped: bool = False) -> list[Term]:
        """What an expert has beside the dense row of its cluster; `grouped`: less what `Terms.grouped` has of it."""
        terms = []
        for stack, rows in self.rows:
            kind, row = stack.kind, stack.rows[e]
            if row < 0 or stack.part == OwnWeights.name or (grouped and kind.at_once and self._is_beside(stack)):
                continue
            shared = self._shared.get(id(stack))
            beside = None if shared is None else Row(self._rows_by[id(shared)], shared.rows[e])
            terms.append(Term(kind, Row(rows, row, beside), self.fade(e) if kind.fades_in else 1.0))
        return terms

    def is_compiled(self, base: Term | None, e: int, routed: Routed) -> bool:
        """Whether an expert is nothing but a dense row, all of which the compiled products can do."""
        if self.way is not NATIVE or base is None or self.fade(e) != 1:
            return False
        if any(term.kind.changes_weights for term in self.own(e)) or "gate_up_bias_NG" in base.row:
            return False
        (x_TD, *other), dtype = routed.inputs, base.row.dtype("gate_up_NGD")
        return not other and dtype == x_TD.dtype and self.container.is_compiled_activation()


def unbound(held: object, leaves: Mapping[str, object]) -> dict[str, tuple[Tensor, ...]]:
    """The rows of each of these tensors of a stack."""
    return {leaf: getattr(held, leaf).unbind(0) for leaf in leaves}


def forward(terms: Terms, routed: Routed) -> Tensor:
    """The sum over each token's experts of router weight times output [T, D], in float32 at least.

    What no token used gets a gradient of zeros and not none, as in fused stock experts: data-parallel training waits for
    the gradient of every parameter. So nothing of everything is added.
    """
    total_TD = _outputs(terms, routed)
    if not torch.is_grad_enabled():
        return total_TD
    trained = [piece for piece in (*terms.anything(), routed.weight_TM) if piece.requires_grad]
    if not trained:
        return total_TD
    return total_TD + torch.cat([piece.reshape(-1)[:0].to(total_TD.dtype) for piece in trained]).sum()


def _outputs(terms: Terms, routed: Routed) -> Tensor:
    x_TD, container = routed.inputs[0], terms.container
    if not len(x_TD):
        return x_TD.clone()  # a sum of nothing that gradients can still be asked of
    place_P = container.table(x_TD.device)[0][routed.index_TM.reshape(-1)]
    place_P, order_P = torch.sort(place_P, stable=True)
    token_P = order_P // routed.index_TM.shape[1]
    weight_P1 = routed.weight_TM.reshape(-1, 1).index_select(0, order_P)
    # The last place is that of pairs that do not run.
    counts = iter(torch.bincount(place_P, minlength=container.layout.num_experts + 1).tolist())
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    total_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    start = 0
    for row, experts in container.clusters:
        ends = list(itertools.accumulate((next(counts) for _ in experts), initial=0))
        members = [
            Selected(e, slice(a, b)) for e, (a, b) in zip(experts, itertools.pairwise(ends), strict=True) if a < b
        ]
        here = slice(start, start + ends[-1])
        start = here.stop
        if members:
            _add_outputs(total_TD, terms, row, members, routed, token_P[here], weight_P1[here])
    return total_TD


def _add_outputs(
    total_TD: Tensor,
    terms: Terms,
    row: int,
    members: list[Selected],
    routed: Routed,
    token_Q: Tensor,
    weight_Q1: Tensor,
) -> None:
    """What each token gets of one cluster."""
    norm = terms.container.post_expert_norm
    if norm is None:
        _add_products(total_TD, terms, row, members, routed, token_Q, weight_Q1)
    else:  # outputs are normed one by one, so nothing can be summed before
        each_Q = torch.arange(len(token_Q), device=token_Q.device)
        out_QD = total_TD.new_zeros(len(token_Q), total_TD.shape[1])
        _add_products(out_QD, terms, row, members, routed.of(token_Q), each_Q, torch.ones_like(weight_Q1))
        _add(total_TD, terms, token_Q, norm(out_QD.to(routed.inputs[0].dtype)) * weight_Q1)
    for e, at in members:
        for constant_D in terms.constants(e):
            _add(total_TD, terms, token_Q[at], weight_Q1[at] * constant_D)


def _add(total_TD: Tensor, terms: Terms, token_Q: Tensor, out_QD: Tensor) -> None:
    if terms.way is NATIVE and out_QD.dtype in native.FORMATS:
        native.spread_(total_TD, out_QD, token_Q)
    else:
        total_TD.index_add_(0, token_Q, out_QD.to(total_TD.dtype))


def _add_products(
    total_TD: Tensor,
    terms: Terms,
    row: int,
    members: list[Selected],
    routed: Routed,
    token_Q: Tensor,
    weight_Q1: Tensor,
) -> None:
    """The products of one cluster: with its dense row once per token, with what its members have of their own per pair."""
    base = terms.base(row)
    if len(members) == 1 and terms.is_compiled(base, members[0].expert, routed):
        item_Q = torch.zeros_like(token_Q)
        hidden_QF = native.gated(routed.inputs[0], base.row.alone("gate_up_NGD"), weight_Q1, item_Q, token_Q)
        if routed.down_TF is not None:
            hidden_QF = modulate(hidden_QF, routed.down_TF[token_Q])
        return native.scatter_(total_TD, hidden_QF, base.row.alone("down_NDF"), item_Q, token_Q)
    each_Q = torch.arange(len(token_Q), device=token_Q.device)
    grouped = terms.grouped(members) if base is not None and terms.way is not None else []
    own = {e: terms.own(e, grouped=bool(grouped)) for e, _ in members}
    own = {e: [term for term in found if term.kind.changes_weights] for e, found in own.items()}
    if base is None and not any(own.values()):
        return
    pre_QG: Tensor | None = None
    if base is not None:
        token_U, unit_Q, fade_Q1 = token_Q, None, terms.fades(members, weight_Q1)
        if len(members) > 1:
            token_U, unit_Q = torch.unique(token_Q, return_inverse=True)
        pre_UG = base.first(tuple(x_TD.index_select(0, token_U) for x_TD in routed.inputs))
        pre_QG = faded(pre_UG if unit_Q is None else pre_UG.index_select(0, unit_Q), fade_Q1)
    for kind, stack, row_Q in grouped:
        kind.add_first(terms.way, pre_QG, routed.inputs, token_Q, stack, row_Q, each_Q)
    if any(own.values()):
        pre_QG = _with_own(pre_QG, own, members, tuple(x_TD.index_select(0, token_Q) for x_TD in routed.inputs))
    hidden_QF = terms.container.hidden(pre_QG, weight_Q1, terms.way is NATIVE)
    if routed.down_TF is not None:
        hidden_QF = modulate(hidden_QF, routed.down_TF[token_Q, : hidden_QF.shape[1]])  # a narrowed expert has fewer
    for kind, stack, row_Q in grouped:
        kind.add_second(terms.way, total_TD, hidden_QF, token_Q, stack, row_Q, each_Q)
    for e, at in members:
        for term in own[e]:
            if (out_QD := term.second(hidden_QF[at], weight_Q1[at])) is not None:
                _add(total_TD, terms, token_Q[at], out_QD)
    if base is not None:
        hidden_QF, weight_Q1 = faded(hidden_QF, fade_Q1), faded(weight_Q1, fade_Q1)
        if unit_Q is not None:
            hidden_QF, weight_Q1 = (
                x.new_zeros(len(token_U), x.shape[1]).index_add_(0, unit_Q, x) for x in (hidden_QF, weight_Q1)
            )
        _add(total_TD, terms, token_U, base.second(hidden_QF, weight_Q1))


def _with_own(
    pre_QG: Tensor | None, own: Mapping[int, list[Term]], members: list[Selected], inputs: tuple[Tensor, ...]
) -> Tensor:
    """First products [Q, G] with what each member's own terms add."""
    rows = []
    for e, at in members:
        whole = [] if pre_QG is None else [pre_QG[at]]
        more = [term.first(tuple(x_QD[at] for x_QD in inputs)) for term in own[e]]
        there = [*whole, *(x for x in more if x is not None)]
        rows.append(functools.reduce(torch.add, there))
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def faded(x: Tensor, fade_Q1: Tensor | None) -> Tensor:
    return x if fade_Q1 is None else x * fade_Q1.to(x.dtype)
