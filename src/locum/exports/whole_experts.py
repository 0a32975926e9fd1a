"""What the experts of a container are made of, and the same experts as whole weights, W = base + B A.

Everything that an export reads of a container's rows is in this file.

Letters: E experts, N stacked items, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.convert import open_containers, write_rows
from ..checkpoints.skeleton import is_compressed
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..containers.rows import adapter_product
from ..models.families import find_layers, set_expert_count

# What a container may hold besides an expert's own weights, in words for people.
SHARED = "shared bases"
LOW_RANK = "low-rank stand-ins"
NOTHING = "experts that are nothing"
CONSTANTS = "constants in place of experts"
ON_TOP = "constants on top of weights"
POLICY = "a routing policy"


def parts_in(layout: Layout) -> tuple[str, ...]:
    """Which of the parts above a container holds."""
    dense, ranks, constants = layout.dense_of, layout.rank_of, layout.constant_of
    rows = [row for row in dense if row >= 0]
    present = {
        SHARED: len(set(rows)) < len(rows),
        LOW_RANK: bool(layout.ranks),
        NOTHING: any(max(parts) < 0 for parts in zip(dense, ranks, constants, strict=True)),
        CONSTANTS: layout.num_constants > 0,
        ON_TOP: any(row >= 0 and constant >= 0 for row, constant in zip(dense, constants, strict=True)),
        POLICY: layout.routing is not None,
    }
    return tuple(part for part, is_there in present.items() if is_there)


def without_rows(layout: Layout) -> tuple[int, ...]:
    """The experts that have no dense row."""
    return tuple(e for e, row in enumerate(layout.dense_of) if row < 0)


def whole_expert(container: StandInExperts, e: int) -> dict[str, Tensor]:
    """The weights that one expert of a container computes with, base + B A, as one dense row. Summed in float32."""
    layout, row = container.layout, container.layout.dense_of[e]
    d, f, gates = layout.hidden_size, layout.expert_width, 2 if layout.has_gate else 1
    shapes = {"gate_up_NGD": (gates * f, d), "down_NDF": (d, f)}
    if layout.has_bias:
        shapes |= {"gate_up_bias_NG": (gates * f,), "down_bias_ND": (d,)}
    like = next(container.parameters())
    tensors = {name: torch.zeros(shape, device=like.device) for name, shape in shapes.items()}
    if row >= 0:
        tensors = {name: getattr(container.dense, name)[row].detach().float() for name in shapes}
    elif layout.bias_of[e] >= 0:
        own = dict(container.biases.named_parameters())
        tensors |= {name: tensor[layout.bias_of[e]].detach().float() for name, tensor in own.items()}
    if layout.rank_of[e] >= 0:
        product = adapter_product(container.adapters[layout.rank_of[e]], layout.adapter_of[e])
        first = [product[name] for name in ("gate_FD", "up_FD") if name in product]
        tensors["gate_up_NGD"] = tensors["gate_up_NGD"] + torch.cat(first)
        tensors["down_NDF"] = tensors["down_NDF"] + product["down_DF"]
    return {name: tensor.to(like.dtype) for name, tensor in tensors.items()}


def with_whole_experts(container: StandInExperts) -> StandInExperts:
    """A container of whole experts that computes what this one does. It must have no constants and no policy."""
    rows, none = tuple(range(container.num_experts)), (-1,) * container.num_experts
    layout = dataclasses.replace(
        container.layout, dense_of=rows, rank_of=none, adapter_of=none, constant_of=none, ranks=()
    )
    experts = [whole_expert(container, e) for e in rows]
    tensors = {f"dense.{name}": torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    whole = StandInExperts(layout, container.apply_gate, experts[0]["down_NDF"].dtype, "meta")
    whole.load_state_dict(tensors, strict=True, assign=True)
    whole.post_expert_norm = container.post_expert_norm
    return whole.train(container.training)


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A live model with stock experts in place of its containers. All layers must have equally many experts."""
    for layer in find_layers(model):
        if isinstance(layer.experts, StandInExperts):
            model.set_submodule(layer.shape.name, with_whole_experts(layer.experts))
    if is_compressed(model.config):
        model = open_containers(model)
    layers = find_layers(model)
    for config in (model.config, *(layer.experts.config for layer in layers)):
        set_expert_count(config, layers[0].shape.num_experts)
    return model


def own_experts(container: StandInExperts, stock: nn.Module) -> dict[str, Tensor]:
    """The stock tensors of a container's experts that have a dense row, in their order. `stock` is used up."""
    write_rows(stock, container, [row for row in container.layout.dense_of if row >= 0])
    return stock.state_dict()


def constants_of(container: StandInExperts) -> dict[int, Tensor]:
    """What the experts without a dense row put out [D], by their number in the container. They must have no adapter."""
    layout, zero_D = container.layout, container.dense.down_NDF.new_zeros(container.layout.hidden_size)
    rows = {e: layout.constant_of[e] for e in without_rows(layout)}
    return {e: container.constant_ND[row].detach() if row >= 0 else zero_D for e, row in rows.items()}
