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
from ..containers.layout import Layout, StackLayout
from ..containers.rows import rows_of_expert, whole_weights
from ..experts.parts.constant import Constant
from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.shared_base import SharedBase
from ..models.families import find_layers, set_expert_count
from .narrower import one_width, set_width

# What a container may hold besides parts of experts, in words for people.
NOTHING = "experts that are nothing"
ON_TOP = "constants on top of weights"
POLICY = "a routing policy"
BITS = "weights in few bits"


def parts_in(layout: Layout) -> tuple[str, ...]:
    """What a container holds besides experts' own weights, in words: kinds of parts, and the four above."""
    beside = [stack.kind for stack in layout.stacks if not stack.kind.is_whole]
    kinds = dict.fromkeys(kind.plural for kind in beside if kind.has_products or not kind.as_weights)
    beyond = [stack.rows for stack in layout.stacks if not stack.kind.as_weights]
    present = {
        SharedBase.plural: layout.num_dense < sum(row >= 0 for row in layout.dense_of),
        **dict.fromkeys(kinds, True),
        NOTHING: any(all(stack.rows[e] < 0 for stack in layout.stacks) for e in range(layout.num_experts)),
        ON_TOP: any(d >= 0 and c >= 0 for rows in beyond for d, c in zip(layout.dense_of, rows, strict=True)),
        POLICY: layout.routing is not None,
        BITS: bool(layout.formats),
    }
    return tuple(part for part, is_there in present.items() if is_there)


def beyond_weights(layout: Layout) -> tuple[str, ...]:
    """What whole weights cannot say: parts that are no weights, and a routing policy."""
    kinds = {stack.kind.plural for stack in layout.stacks if not stack.kind.as_weights}
    return tuple(part for part in parts_in(layout) if part in kinds or part == POLICY)


def without_rows(layout: Layout) -> tuple[int, ...]:
    """The experts that have no dense row."""
    return tuple(e for e, row in enumerate(layout.dense_of) if row < 0)


def with_whole_experts(container: StandInExperts, dtype: torch.dtype, width: int | None = None) -> StandInExperts:
    """A container of whole experts that computes what this one does, in the dtype of its numbers, or in `dtype` where all are in
    few bits. It must have no constants and no policy; all its experts are narrowed to `width`, where there is one."""
    rows = tuple(range(container.num_experts))
    layout = dataclasses.replace(container.layout, stacks=(StackLayout(OwnWeights.name, (), rows),))
    dtype = next((p.dtype for p in container.parameters() if p.is_floating_point()), dtype)
    if width is None:
        own = (whole_weights(container, e) for e in rows)
    else:  # a narrowed row is a whole one of that width
        layout = dataclasses.replace(layout, expert_width=width)
        own = (row for e in rows for row in rows_of_expert(container, e).values())
    experts = [{name: tensor.detach().to(dtype) for name, tensor in expert.items()} for expert in own]
    tensors = {OwnWeights.prefix + name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    whole = StandInExperts(layout, container.activate, experts[0]["down_NDF"].dtype, "meta")
    whole.load_state_dict(tensors, strict=True, assign=True)
    whole.post_expert_norm = container.post_expert_norm
    return whole.train(container.training)


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A live model with stock experts in place of its containers, narrower ones where all are narrowed alike and the config can
    say so. All layers must have equally many experts."""
    width = one_width(model)
    if width is not None and not set_width(model, width):
        width = None
    for layer in find_layers(model):
        if isinstance(layer.experts, StandInExperts):
            model.set_submodule(layer.shape.name, with_whole_experts(layer.experts, model.dtype, width))
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
    width = container.layout.hidden_size
    found = {e: rows_of_expert(container, e).get(Constant.prefix) for e in without_rows(container.layout)}
    zero_D = container.dense.down_NDF.new_zeros(width)
    return {e: row["constant_ND"] if row else zero_D for e, row in found.items()}
