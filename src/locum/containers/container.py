"""The one experts module for everything the stock layout cannot hold: shared bases, adapters, constants, nothing.

It is called exactly like a stock experts module, `container(x [T, D], top_k_index [T, K], top_k_weights [T, K])`, and
computes for every selected expert  W_down [act(W_gate x) * (W_up x)] + c,  W and c the sums of its parts (experts/parts/).

Work on a dense row (whole weights) is shared by all the experts that use it. For a token, the products of gate and up with
a base are computed once however many of the base's members are selected, and so is the down projection, applied to the sum
of their weighted hidden states. Other parts are added around them, per expert.

There are two ways through it, and `kernels.choice` takes one by shape: all pairs at once, with shapes that do not depend on
what was routed (here), and cluster by cluster (clusters.py), which every kind of part can go. What is in few bits stays packed:
some products read its bytes as they multiply (kernels/packed.py), else a row of it is numbers while it is multiplied with.
Whole experts alone are one call of a compiled product, where there is one.

Where a layer has a routing policy (experts/policies/), the policy first picks the experts that run and their inputs, which
all experts of a token share. An index of -1 is an expert that does not run. What the policy computes beside the experts is added.

Letters: T tokens, K top-k, M experts that may run, P pairs (token, expert), E experts, N stacked items, D model
width, F expert width, G 2F with a gate and F without, X what the table holds of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.part import Part
from ..experts.policies.policy import Routed, modulate
from ..kernels import choice, few_bits, few_rows, native
from ..kernels.packed import Matrices, Packed, coding
from ..kernels.products import Products
from . import clusters
from .layout import Layout, StackLayout
from .stack import Stack


def is_swiglu(activate: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is silu(gate) * up: tried on numbers of every size, since some families clamp or shift them."""
    generator = torch.Generator().manual_seed(0)
    sizes_P1 = torch.logspace(-3, 4, 64, device="cpu")[:, None]
    probe_PG = torch.randn(64, 64, generator=generator, device="cpu") * sizes_P1
    gate_PF, up_PF = probe_PG.chunk(2, dim=1)
    return torch.allclose(activate(probe_PG), functional.silu(gate_PF) * up_PF, rtol=1e-5, atol=0)


class Held:
    """Tensors by their names, as grouped products take them: those in few bits packed. A class that torch.compile knows."""

    def __init__(self, tensors: Mapping[str, Tensor | Packed]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    @classmethod
    def of(cls, held: Any, stack: StackLayout, layout: Layout) -> Any:
        """What holds a stack's tensors, where none is in few bits, as it is."""
        if not stack.format:
            return held
        shapes, packed = stack.kind.tensors(stack.variant, layout), stack.packed(layout)
        tensors = {leaf: getattr(held, leaf) for leaf in shapes}
        return cls({n: Packed(t, stack.format, (*shapes[n],)) if n in packed else t for n, t in tensors.items()})


def _is_known(stack: StackLayout, layout: Layout) -> bool:
    """Whether a stack is of numbers, or in few bits that grouped products may know."""
    if not stack.format:
        return True
    shapes = stack.kind.tensors(stack.variant, layout)
    return all(coding(stack.format, *shapes[leaf]) is not None for leaf in stack.packed(layout))


class StandInExperts(nn.Module):
    """The container of one layer.

    `activate` maps the first product [P, G], gate columns first, to hidden states [P, F]; it is the family's own.
    `way` takes the place of what `kernels.choice` says, for measurements.
    """

    def __init__(
        self, layout: Layout, activate: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layout = layout
        self.num_experts = layout.num_experts
        self.activate = activate
        self.paths: list[tuple[str, StackLayout]] = []  # where each stack's module is; "" for the container itself
        for prefix, stack in layout.prefixed():
            shapes = {leaf: (stack.num_rows, *row) for leaf, row in stack.stored(layout).items()}
            self._register(prefix, shapes, dtype, device, stack.packed(layout))
            self.paths.append((prefix.removesuffix("."), stack))
        stored = layout.routing.tensors(layout) if layout.routing else {}
        self._register("", stored, dtype, device)
        self.policy_tensors = tuple(stored)
        # The family's own, applied to an expert's output before its router weight.
        self.post_expert_norm: nn.Module | None = None
        self.way: str | None = None
        self.clusters = clusters.clusters_of(layout)
        # No buffer: from_pretrained overwrites those that are in no file.
        self._table_XE = torch.tensor(self._places(), device="cpu")
        self._at_once = all(stack.kind.at_once and _is_known(stack, layout) for stack in layout.stacks)
        without = [dense < 0 for dense in layout.dense_of]
        products = [any(s.rows[e] >= 0 for s in layout.stacks if s.kind.has_products) for e in range(self.num_experts)]
        self._low_rank = 2 * sum(a and b for a, b in zip(without, products, strict=True)) > self.num_experts
        self._is_swiglu: bool | None = None  # not known yet
        kinds = (
            Matrices(s.format, *s.kind.tensors(s.variant, layout)[n]) for s in layout.stacks for n in s.packed(layout)
        )
        self._in_few_bits = tuple(dict.fromkeys(kinds))
        self._aligned = self._at_once and all(shape[-1] % 8 == 0 for shape in layout.tensor_shapes().values())

    def _register(
        self,
        prefix: str,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
        packed: Collection[str] = (),
    ) -> None:
        """A stack as a module under the path that its prefix says, or parameters of the container where it is empty."""
        if not prefix:
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
            return
        parent: nn.Module = self
        *above, leaf = prefix.removesuffix(".").split(".")
        for name in above:
            if name not in parent._modules:  # stacks of one kind are numbered
                parent.add_module(name, nn.ModuleList())
            parent = parent.get_submodule(name)
        parent.add_module(leaf, Stack(shapes, dtype, device, packed))

    def extra_repr(self) -> str:
        layout = self.layout
        stacks = ", ".join(f"{s.num_rows} {s.part}{list(s.variant) or ''} {s.format}".rstrip() for s in layout.stacks)
        policy = f", routing=({layout.routing})" if layout.routing else ""
        return f"experts={layout.num_experts}, {stacks}{policy}"

    def stack(self, path: str) -> nn.Module:
        """The module that holds a stack's tensors."""
        return self.get_submodule(path) if path else self

    def held(self) -> dict[str, Any]:
        """What holds each stack's tensors during one forward call, by its path."""
        stacks = {path: self.stack(path) for path, _ in self.paths}
        if torch.compiler.is_compiling():  # no hooks in a graph, which could not hold what a stack hands out
            return stacks
        return {path: stack() if path else self for path, stack in stacks.items()}

    def forward(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed = self.routed(x_TD, top_k_index, top_k_weights)
        way = choice.LOOP
        if self._at_once and self.may_group(x_TD):
            pairs = routed.index_TM.numel()
            way = self.way or choice.choose(
                x_TD.device, x_TD.dtype, pairs, self.num_experts, self._aligned, self._low_rank, self._in_few_bits
            )
        if way == choice.LOOP:
            out_TD = clusters.forward(self.terms(x_TD), routed)
        elif (out_TD := self._in_one_call(routed, way)) is None:
            out_TD = self._all_at_once(routed, choice.PRODUCTS[way]())
        added_TD = self.layout.routing.added(self._stored(), x_TD) if self.layout.routing else None
        return (out_TD if added_TD is None else out_TD + added_TD).to(x_TD.dtype)

    def may_group(self, x_TD: Tensor) -> bool:
        """Whether all pairs can go at once: products do not change number formats. Bytes are in none."""
        return all(stack.dtype in (x_TD.dtype, torch.uint8) for stack in self.stacks())

    def terms(self, x_TD: Tensor) -> clusters.Terms:
        """What clusters.py computes with."""
        return clusters.Terms(self, x_TD)

    def stacks(self) -> list[Stack]:
        return [self.stack(path) for path, _ in self.paths if path]

    def routed(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        """What the layer's policy, if it has one, makes of what the router selected."""
        policy = self.layout.routing
        if policy is None:
            return Routed(index_TK, weight_TK, (x_TD,))
        return policy.route(self.layout, self._stored(), x_TD, index_TK, weight_TK)

    def _stored(self) -> dict[str, Tensor]:
        """The policy's tensors by name."""
        return {name: getattr(self, name) for name in self.policy_tensors}

    def hidden(self, pre_PG: Tensor, weight_P1: Tensor, compiled: bool) -> Tensor:
        """Hidden states [P, F] of first products, times router weights; by the compiled products, if they know how."""
        if compiled and self.is_compiled_activation():
            return native.swiglu(pre_PG, weight_P1)
        return self.activate(pre_PG) * weight_P1.to(pre_PG.dtype)

    def is_compiled_activation(self) -> bool:
        """Whether the family's activation is silu(gate) * up, which the compiled products know; tried once."""
        if self._is_swiglu is None:
            self._is_swiglu = self.layout.has_gate and is_swiglu(self.activate)
        return self._is_swiglu

    def _places(self) -> list[tuple[int, ...]]:
        """Per expert: its place in the order of the clusters, then its row in each stack. The last column is no expert.

        So an index of -1 reads it: it has the last place, and no row anywhere.
        """
        order = [e for cluster in self.clusters for e in cluster.experts]
        place = (*(order.index(e) for e in range(self.num_experts)), self.num_experts)
        return [place, *((*stack.rows, -1) for stack in self.layout.stacks)]

    def table(self, device: torch.device) -> Tensor:
        """What `_places` says, kept where it was last needed."""
        if self._table_XE.device != device:
            self._table_XE = torch.tensor(self._places(), device=device)
        return self._table_XE

    def _in_one_call(self, routed: Routed, way: str) -> Tensor | None:
        """What whole experts alone put out, where the compiled products make it in one call; else None."""
        if len(self.paths) != 1:  # none, where all experts became nothing
            return None
        x_TD, (path, stack) = routed.inputs[0], self.paths[0]
        alone = stack.part == OwnWeights.name and not self.layout.has_bias
        if not alone or way not in ("native", "few bits") or self.post_expert_norm is not None:
            return None
        if len(routed.inputs) > 1 or routed.down_TF is not None or not self.is_compiled_activation():
            return None
        held = Held.of(self.held()[path], stack, self.layout)
        weights = (held.gate_up_NGD, held.down_NDF)
        row_TM = self.table(x_TD.device)[1][routed.index_TM]
        if way == "few bits" and all(isinstance(weight, Packed) for weight in weights):
            return few_bits.experts(x_TD, *weights, row_TM, routed.weight_TM)
        if few_rows.serves(x_TD, *weights):
            return few_rows.experts(x_TD, *weights, row_TM, routed.weight_TM)
        return None

    def _all_at_once(self, routed: Routed, way: Products) -> Tensor:
        """All pairs at once. Nothing waits for what was routed, and no shape depends on it."""
        x_TD, num_main = routed.inputs[0], routed.index_TM.shape[1]
        _, *row_XP = self.table(x_TD.device)[:, routed.index_TM.reshape(-1)].unbind(0)
        pairs = routed.index_TM.numel()
        token_P = torch.arange(pairs, device=x_TD.device).div(num_main, rounding_mode="floor")
        weight_P1 = routed.weight_TM.reshape(-1, 1)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        held = self.held()
        stacks = [
            (stack.kind, Held.of(held[path], stack, self.layout), row_P)
            for (path, stack), row_P in zip(self.paths, row_XP, strict=True)
        ]
        if self.post_expert_norm is None:
            self._add_products(total_TD, routed, stacks, token_P, weight_P1, way)
        else:  # outputs are normed one by one, so nothing can be summed before
            out_PD = total_TD.new_zeros(pairs, x_TD.shape[1])
            each_P = torch.arange(pairs, device=x_TD.device)
            self._add_products(out_PD, routed.of(token_P), stacks, each_P, torch.ones_like(weight_P1), way)
            total_TD.index_add_(0, token_P, (self.post_expert_norm(out_PD.to(x_TD.dtype)) * weight_P1).to(wide))
        for kind, stack, row_P in stacks:
            kind.add_output(total_TD, token_P, weight_P1, stack, row_P)
        return total_TD

    def _add_products(
        self,
        total_TD: Tensor,
        routed: Routed,
        stacks: list[tuple[type[Part], Any, Tensor]],
        token_P: Tensor,
        weight_P1: Tensor,
        way: Products,
    ) -> None:
        """Add to each token its pairs' router weights times outputs, constants left out. `stacks`: kind, tensors, rows."""
        f, each_P = self.layout.expert_width, torch.arange(len(token_P), device=token_P.device)
        pre_PG = routed.inputs[0].new_zeros(len(token_P), f * (2 if self.layout.has_gate else 1))
        for kind, stack, row_P in stacks:
            kind.add_first(way, pre_PG, routed.inputs, token_P, stack, row_P, each_P)
        for kind, stack, row_P in stacks:
            kind.add_first_bias(pre_PG, stack, row_P)
        hidden_PF = self.hidden(pre_PG, weight_P1, way is choice.NATIVE)
        if routed.down_TF is not None:
            hidden_PF = modulate(hidden_PF, routed.down_TF[token_P])
        for kind, stack, row_P in stacks:
            kind.add_second(way, total_TD, hidden_PF, token_P, stack, row_P, each_P)
        for kind, stack, row_P in stacks:
            kind.add_second_bias(total_TD, token_P, weight_P1, stack, row_P)
