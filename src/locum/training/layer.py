"""One layer in training: a container whose parts can be trained apart, the old weights that fade out, and the way back.

    open_layer    stock experts or container  ->  container in training: own rows frozen, bases apart, adapters on rows
                  that can be merged again; beside rows in few bits, which cannot, those that a new plan says
    open_rows     the same without new adapters: what chosen experts have for themselves apart, where it is numbers
    keep_old      puts the original experts' weights beside their stand-ins;  set_beta  blends and finally drops them
    close_layer   merges what can be merged and gives the layer back in the layout that its plan asks for

Annealing (LightMoE, arXiv 2603.12645, Eq. 6). A replaced expert computes with

    W(beta) = beta (W_old - B0 A0) + (1 - beta) W_base + B A,       c(beta) = (1 - beta) c

where B0 A0 is its adapter as it starts. With the paper's start, B0 = 0, this is Eq. 6 to the letter. Beyond the paper,
a stand-in that starts from an SVD, without a base, or from an earlier recovery, begins at W_old too, so that the model
computes what the original computed before the first step, whatever the start.

Letters: E experts, D model width, F expert width, R rank, N stacked items.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..containers.build import old_weights, stack_dense
from ..containers.container import StandInExperts
from ..containers.layout import Layout, StackLayout
from ..containers.rows import row_weights, rows_of_expert, tensors_of
from ..containers.stack import Stack, as_numbers
from ..errors import OptionError
from ..experts.parts.low_rank import LowRank, adapter_product
from ..experts.parts.own_weights import OwnWeights, rows_of
from ..experts.weights import ExpertWeights
from ..files import existing_folder
from ..models.families import MoeLayer, canonical_activation, read_expert, write_expert
from ..plans.plan import KEPT, LayerPlan, Plan
from ..shapes import ModelShape
from ..stats.on_disk import on_disk
from .experts import TrainingExperts
from .rounding import Rounding


@dataclass(frozen=True)
class OpenLayer:
    """A layer in training and what is needed to give it back."""

    name: str
    plan: LayerPlan
    layout: Layout  # what the layer goes back to: that of the checkpoint, with the adapters that stay
    rows: tuple[int, ...]  # dense rows that were given an adapter for training, to be merged into them
    container: TrainingExperts
    stock: nn.Module | None  # the stock experts module, emptied, where the checkpoint has one
    dtype: torch.dtype  # of the checkpoint
    device: torch.device
    top_k: int  # experts that the router selects


def open_layer(
    model: nn.Module,
    layer: MoeLayer,
    plan: LayerPlan | None,
    rank: int,
    train_bases: bool,
    seed: int,
    becomes: LayerPlan | None = None,
) -> OpenLayer:
    """Put the training container of one layer into the model; every parameter of it is frozen to begin with.

    Own rows of experts get an adapter each; so do shared bases that are not trained themselves and whose users have
    none. A ~ N(0, 1 / columns) and B = 0, so nothing changes yet. To rows in few bits nothing can be added: experts that
    have such get the adapters that `becomes` has more than the plan.
    """
    begun = _begin(model, layer, plan)
    layout = begun.layout if becomes is None or begun.stock is not None else Layout.of(becomes, layer.shape)
    num_own = sum(slot.is_untouched for slot in begun.made_by.slots)
    rows = rows_to_adapt(layout, num_own, train_bases)
    training = layout.with_adapters(rows, rank) if rows else layout
    adapters = _adapters(begun.layout, training, begun.tensors, begun.device, seed)
    tensors = _but_adapters(begun.layout, begun.tensors) | adapters
    container = _contained(model, layer, _in_numbers(training), begun, tensors)
    container.rounding = _rounding(begun.layout, training, begun.tensors)
    container.split_bases(num_own)
    return begun.opened(layout, rows, container)


def open_rows(model: nn.Module, layer: MoeLayer, plan: LayerPlan | None, experts: Collection[int]) -> OpenLayer:
    """Put the training container of one layer into the model, with the rows that no other than these experts use apart. Every
    parameter of it is frozen to begin with, and nothing changes."""
    begun = _begin(model, layer, plan)
    container = _contained(model, layer, begun.layout, begun, begun.tensors)
    alone = begun.layout.rows_alone(experts)
    for prefix, stack in begun.layout.prefixed():
        if prefix in alone and not stack.format:
            container.set_apart(prefix.removesuffix("."), alone[prefix])
    return begun.opened(begun.layout, (), container)


@dataclass(frozen=True)
class _Begun:
    """A layer before its training container is there."""

    name: str
    plan: LayerPlan
    made_by: LayerPlan  # whose rows the layer has: of a stock one all are its own, whatever the plan merged
    layout: Layout
    tensors: dict[str, Tensor]
    stock: nn.Module | None
    dtype: torch.dtype  # of what is in no format
    device: torch.device
    top_k: int

    def opened(self, layout: Layout, rows: tuple[int, ...], container: TrainingExperts) -> OpenLayer:
        of_layer = (self.stock, self.dtype, self.device, self.top_k)
        return OpenLayer(self.name, self.plan, layout, rows, container, *of_layer)


def _begin(model: nn.Module, layer: MoeLayer, plan: LayerPlan | None) -> _Begun:
    experts, shape = layer.experts, layer.shape
    kept = LayerPlan(shape.name, (KEPT,) * shape.num_experts)
    plan = plan or kept
    like = next(experts.parameters(), next(layer.router.parameters()))  # a container of mere nothings has no parameter
    floats = (tensor.dtype for tensor in (*experts.parameters(), *model.parameters()) if tensor.is_floating_point())
    of_layer = (next(floats), like.device, shape.top_k)  # the dtype of what is in no format, where experts have any
    if isinstance(experts, StandInExperts):
        return _Begun(shape.name, plan, plan, experts.layout, tensors_of(experts), None, *of_layer)
    tensors = stack_dense([read_expert(experts, e) for e in range(shape.num_experts)])
    return _Begun(shape.name, plan, kept, Layout.of(kept, shape), tensors, experts, *of_layer)


def _contained(
    model: nn.Module, layer: MoeLayer, layout: Layout, begun: _Begun, tensors: dict[str, Tensor]
) -> TrainingExperts:
    """The container, in the model, all of it frozen. A stock module gives its weights up to it."""
    container = TrainingExperts(layout, canonical_activation(layer.experts), begun.dtype, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    container.post_expert_norm = getattr(layer.experts, "post_expert_norm", None)
    container.requires_grad_(False)
    model.set_submodule(begun.name, container)
    if begun.stock is not None:
        if container.post_expert_norm is not None:
            begun.stock.post_expert_norm = None  # it stays alive in the container, and comes back when that closes
        begun.stock.to("meta")
    return container


def rows_to_adapt(layout: Layout, num_own: int, train_bases: bool) -> tuple[int, ...]:
    """Dense rows of numbers, the first so many experts' own, that stay frozen themselves and none of whose users has an adapter."""
    adapted = [any(stack.rows[e] >= 0 for stack in layout.stacks_of(LowRank)) for e in range(layout.num_experts)]
    served = {row for row, has_one in zip(layout.dense_of, adapted, strict=True) if has_one}
    frozen = num_own if train_bases else layout.num_whole_numbers
    return tuple(row for row in range(frozen) if row not in served)


def _in_numbers(layout: Layout) -> Layout:
    """The layout in which no adapter is in few bits."""
    stacks = (replace(stack, format="") if stack.part == LowRank.name else stack for stack in layout.stacks)
    return replace(layout, stacks=tuple(stacks))


def _but_adapters(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    adapters = tuple(prefix for prefix, stack in layout.prefixed() if stack.part == LowRank.name)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(adapters)}


def _stacks_there(layout: Layout) -> dict[tuple[Any, ...], tuple[str, StackLayout]]:
    """The stacks of adapters with their prefixes, by what tells them from one another."""
    return {(s.variant, s.format): (prefix, s) for prefix, s in layout.prefixed() if s.part == LowRank.name}


def _adapters(
    came: Layout, training: Layout, tensors: dict[str, Tensor], device: torch.device, seed: int
) -> dict[str, Tensor]:
    """All adapters in float32: those that are there, and the new ones."""
    generator, there, result = torch.Generator().manual_seed(seed), _stacks_there(came), {}
    for key, (prefix, stack) in _stacks_there(training).items():
        old, found = there.get(key, ("", None))
        of_row = [-1 if found is None else found.rows[stack.rows.index(row)] for row in range(stack.num_rows)]
        for leaf, shape in LowRank.tensors(stack.variant, training).items():
            if device.type == "meta":  # numbers of a model without weights
                result[prefix + leaf] = torch.empty(stack.num_rows, *shape, device=device)
                continue
            new = torch.zeros(of_row.count(-1), *shape)
            if "_A" in leaf:
                new = torch.randn(new.shape, generator=generator) / shape[-1] ** 0.5
            before = () if found is None else as_numbers(tensors[old + leaf], stack.format, shape, torch.float32)
            drawn = iter(new.to(device))
            rows = [next(drawn) if row < 0 else before[row].float() for row in of_row]
            result[prefix + leaf] = torch.stack(rows)
    return result


def _rounding(came: Layout, training: Layout, tensors: dict[str, Tensor]) -> dict[str, dict[str, Rounding]]:
    """Of the stacks of adapters in few bits, to which none are added: they are in both layouts."""
    there = _stacks_there(came)
    return {
        prefix.removesuffix("."): {
            leaf: Rounding(tensors[there[key][0] + leaf], stack.format, shape)
            for leaf, shape in LowRank.tensors(stack.variant, training).items()
        }
        for key, (prefix, stack) in _stacks_there(training).items()
        if stack.format
    }


def keep_old(layer: OpenLayer, read: Callable[[int], ExpertWeights], workdir: Path | None = None) -> None:
    """Put the original weights of every replaced expert into the container, each less the adapter's own product.

    On a processor with a `workdir`, they lie in a file without a name on its disk, mapped into memory, which the system may take
    back at any time; it goes with the last of them.
    """
    container, layout, old = layer.container, layer.layout, old_weights(layer.plan, read)
    experts = sorted(old)
    if not experts:
        return
    stacked: dict[str, Tensor] = {}
    for row, e in enumerate(experts):
        weights, place = old[e], layer.plan.survivors.index(e)
        _check_size(layer, e, weights)
        for name, tensor in rows_of(_less_adapter(weights, container, place, layer.device)).items():
            if name not in stacked:
                stacked[name] = _room(tensor, len(experts), workdir)
            stacked[name][row] = tensor
    container.old = Stack.holding(stacked)
    rows = {layer.plan.survivors.index(e): row for row, e in enumerate(experts)}
    container.old_of = tuple(rows.get(place, -1) for place in range(layout.num_experts))
    container.beta = 1.0


def old_bytes(plan: Plan | None, original: ModelShape) -> int:
    """Bytes of all the weights that `keep_old` would put beside their stand-ins."""
    layers = {layer.layer: layer for layer in (plan.layers if plan else ())}
    fading = ((shape, layers[shape.name].fading) for shape in original.layers if shape.name in layers)
    return sum(len(experts) * shape.parameters() for shape, experts in fading) * original.expert_itemsize


def _check_size(layer: OpenLayer, e: int, weights: ExpertWeights) -> None:
    layout, found = layer.layout, (weights.up_FD.shape[1], weights.up_FD.shape[0])
    if found != (layout.hidden_size, layout.expert_width):
        raise OptionError(
            f"the original's expert {e} of {layer.name} is {found[0]} x {found[1]}, the compressed "
            f"model's are {layout.hidden_size} x {layout.expert_width}; give the model that it was compressed from"
        )


def _room(like: Tensor, count: int, workdir: Path | None) -> Tensor:
    """A tensor for so many of these."""
    if workdir is None or like.device.type != "cpu":
        return like.new_empty(count, *like.shape)
    return on_disk(existing_folder(workdir), (count, *like.shape), like.dtype)


def _less_adapter(weights: ExpertWeights, container: StandInExperts, e: int, device: torch.device) -> ExpertWeights:
    weights = weights.map(lambda name, tensor: tensor.detach().to(device))
    kinds = {prefix: stack.kind for prefix, stack in container.layout.prefixed()}
    rows = {kinds[prefix]: row for prefix, row in rows_of_expert(container, e, but=OwnWeights).items()}
    if LowRank not in rows:
        return weights
    product = adapter_product(rows[LowRank])
    return weights.map(
        lambda name, tensor: (tensor.float() - product[name]).to(tensor.dtype) if name in product else tensor
    )


def set_beta(layer: OpenLayer, beta: float) -> None:
    """Set the share of the old weights; at 0 they are let go, which changes no output and frees their memory."""
    container = layer.container
    container.beta = beta
    if beta == 0:
        container.old = None
        container.old_of = (-1,) * layer.layout.num_experts


def close_layer(model: nn.Module, layer: OpenLayer) -> None:
    """Merge the adapters that training added into their rows; give the layer its checkpoint's layout and dtype."""
    made, layout = _merged(layer), layer.layout
    if layer.stock is not None:
        layer.stock.to_empty(device=layer.device)
        for e in range(layout.num_experts):
            write_expert(layer.stock, e, row_weights(made, e, layout))
        if layer.container.post_expert_norm is not None:
            layer.stock.post_expert_norm = layer.container.post_expert_norm
        model.set_submodule(layer.name, layer.stock)
        return
    rounded = {f"{p}.{leaf}": of for p, leaves in layer.container.rounding.items() for leaf, of in leaves.items()}
    tensors, packed = {}, layout.packed_tensors
    for name, shape in layout.tensor_shapes().items():
        tensor = rounded[name].bytes(made[name]) if name in rounded else made[name][: shape[0]]
        tensors[name] = tensor if name in packed else tensor.to(layer.dtype, copy=True)
    container = StandInExperts(layout, layer.container.activate, layer.dtype, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    container.post_expert_norm = layer.container.post_expert_norm
    model.set_submodule(layer.name, container)


def _merged(layer: OpenLayer) -> dict[str, Tensor]:
    """The container's tensors by their names, in dense rows W + B A where training added an adapter to a row."""
    container = layer.container
    made, training = container.whole_tensors(), container.layout
    prefixes = {prefix for prefix, stack in training.prefixed() if stack.part == LowRank.name}
    if layer.rows:  # what the container holds stays what it is
        made |= {name: made[name].clone() for name in ("dense.gate_up_NGD", "dense.down_NDF")}
    for row in layer.rows:
        rows = rows_of_expert(container, training.dense_of.index(row), but=OwnWeights)
        product = next(LowRank.whole(found, training) for prefix, found in rows.items() if prefix in prefixes)
        for name, change in (("dense.gate_up_NGD", product["gate_up_GD"]), ("dense.down_NDF", product["down_DF"])):
            made[name][row] = (made[name][row].float() + change).to(made[name].dtype)
    return made
