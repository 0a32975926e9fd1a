"""One layer in training: a container whose parts can be trained apart, the old weights that fade out, and the way back.

    open_layer    stock experts or container  ->  container in training: own rows frozen, bases apart, adapters on rows
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

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..containers.build import old_weights, stack_dense
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..containers.rows import row_weights, rows_of_expert, tensors_of
from ..containers.stack import Stack
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


@dataclass(frozen=True)
class OpenLayer:
    """A layer in training and what is needed to give it back."""

    name: str
    plan: LayerPlan
    layout: Layout  # of the checkpoint: what the layer goes back to
    rows: tuple[int, ...]  # dense rows that were given an adapter for training, to be merged into them
    container: TrainingExperts
    stock: nn.Module | None  # the stock experts module, emptied, where the checkpoint has one
    dtype: torch.dtype  # of the checkpoint
    device: torch.device


def open_layer(
    model: nn.Module, layer: MoeLayer, plan: LayerPlan | None, rank: int, train_bases: bool, seed: int
) -> OpenLayer:
    """Put the training container of one layer into the model; every parameter of it is frozen to begin with.

    Own rows of experts get an adapter each; so do shared bases that are not trained themselves and whose users have
    none. A ~ N(0, 1 / columns) and B = 0, so nothing changes yet. A stock module gives its weights up to the container.
    """
    experts, shape = layer.experts, layer.shape
    kept = LayerPlan(shape.name, (KEPT,) * shape.num_experts)
    plan = plan or kept
    if isinstance(experts, StandInExperts):
        stock, layout, made_by = None, experts.layout, plan
        tensors = tensors_of(experts)
    else:
        stock, layout, made_by = experts, Layout.of(kept, shape), kept  # whatever the plan merged, its rows are its own
        tensors = stack_dense([read_expert(experts, e) for e in range(shape.num_experts)])
    activate = canonical_activation(experts)
    like = next(experts.parameters(), next(layer.router.parameters()))  # a container of mere nothings has no parameter
    num_kept = sum(slot.is_kept for slot in made_by.slots)
    rows = rows_to_adapt(layout, num_kept, train_bases)
    training = layout.with_adapters(rows, rank) if rows else layout
    adapters = _adapters(training, tensors, like.device, seed)
    container = TrainingExperts(training, activate, like.dtype, "meta")
    container.load_state_dict(tensors | adapters, strict=True, assign=True)
    container.post_expert_norm = getattr(experts, "post_expert_norm", None)
    container.requires_grad_(False)
    container.split_bases(num_kept)
    model.set_submodule(shape.name, container)
    device = like.device
    if stock is not None:
        if container.post_expert_norm is not None:
            stock.post_expert_norm = None  # it stays alive in the container, and comes back when that closes
        stock.to("meta")
    return OpenLayer(shape.name, plan, layout, rows, container, stock, like.dtype, device)


def rows_to_adapt(layout: Layout, num_kept: int, train_bases: bool) -> tuple[int, ...]:
    """Dense rows that stay frozen themselves and none of whose users has an adapter."""
    adapted = [any(stack.rows[e] >= 0 for stack in layout.stacks_of(LowRank)) for e in range(layout.num_experts)]
    served = {row for row, has_one in zip(layout.dense_of, adapted, strict=True) if has_one}
    frozen = num_kept if train_bases else layout.num_dense
    return tuple(row for row in range(frozen) if row not in served)


def _adapters(training: Layout, tensors: dict[str, Tensor], device: torch.device, seed: int) -> dict[str, Tensor]:
    """All adapters in float32: those that are there, then the new ones."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    prefixes = tuple(prefix for prefix, stack in training.prefixed() if stack.part == LowRank.name)
    for name, shape in training.tensor_shapes().items():
        if name.startswith(prefixes):
            there = [tensors[name].float()] if name in tensors else []
            count = shape[0] - (there[0].shape[0] if there else 0)
            new = torch.zeros(count, *shape[1:], device="meta" if device.type == "meta" else "cpu")
            if device.type == "meta":  # numbers of a model without weights
                new = new.to(device)
            elif "_A" in name:
                new = torch.randn(new.shape, generator=generator) / shape[-1] ** 0.5
            result[name] = torch.cat([*there, new.to(device)])
    return result


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
    dense, layout = _merged_dense(layer), layer.layout
    if layer.stock is not None:
        layer.stock.to_empty(device=layer.device)
        for e in range(layout.num_experts):
            write_expert(layer.stock, e, row_weights(dense, e, layout))
        if layer.container.post_expert_norm is not None:
            layer.stock.post_expert_norm = layer.container.post_expert_norm
        model.set_submodule(layer.name, layer.stock)
        return
    tensors = {}
    for name, shape in layout.tensor_shapes().items():
        tensor = dense[name] if name in dense else layer.container.get_parameter(name).detach()[: shape[0]]
        tensors[name] = tensor.to(layer.dtype, copy=True)
    container = StandInExperts(layout, layer.container.activate, layer.dtype, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    container.post_expert_norm = layer.container.post_expert_norm
    model.set_submodule(layer.name, container)


def _merged_dense(layer: OpenLayer) -> dict[str, Tensor]:
    """The dense rows under the container's names, W + B A where training added an adapter to a row."""
    container = layer.container
    dense = {OwnWeights.prefix + name: tensor for name, tensor in container.dense_tensors().items()}
    training = container.layout
    prefixes = {prefix for prefix, stack in training.prefixed() if stack.part == LowRank.name}
    for row in layer.rows:
        rows = rows_of_expert(container, training.dense_of.index(row), but=OwnWeights)
        product = next(LowRank.whole(found, training) for prefix, found in rows.items() if prefix in prefixes)
        for name, change in (("dense.gate_up_NGD", product["gate_up_GD"]), ("dense.down_NDF", product["down_DF"])):
            dense[name][row] = (dense[name][row].float() + change).to(dense[name].dtype)
    return dense
