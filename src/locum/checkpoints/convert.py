"""Containers with whole experts become stock experts again, in the live model.

A model pruned to unequal numbers of experts is saved in containers, because one number in a config cannot describe it.
Every expert in them is whole, so once loaded it can be an ordinary model with unequal layers, on which calibration,
search and plans work as on any other. Sizes and shapes then are those of the pruned model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..containers.container import StandInExperts
from ..containers.rows import row_weights, tensors_of
from ..errors import UnsupportedModel
from ..models.conversions import save_as_stock
from ..models.families import find_layers, slice_experts, write_expert
from ..models.watch import configs_of
from .skeleton import layouts_of, skeleton


def check_openable(path: str | Path, advice: str) -> None:
    """Refuse a checkpoint with anything but whole experts, from its config alone."""
    for name, layout in layouts_of(path).items():
        if not layout.only_dense:
            raise UnsupportedModel(f"{path} is compressed already ({name} has stand-ins); {advice}")


def write_rows(experts: nn.Module, container: StandInExperts, rows: Sequence[int]) -> None:
    """Make a stock experts module hold these dense rows of a container, in this order. In place."""
    weight, tensors = container.dense.down_NDF, tensors_of(container)
    slice_experts(experts, tuple(range(len(rows))))
    experts.to(weight.dtype).to_empty(device=weight.device)
    for e, row in enumerate(rows):
        write_expert(experts, e, row_weights(tensors, row, container.layout))


def open_containers(model: PreTrainedModel) -> PreTrainedModel:
    """Put stock experts, as many as there are, in the place of containers with whole experts. In place."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    stock = skeleton(config)
    configs = {id(theirs): ours for theirs, ours in zip(configs_of(stock), configs_of(model), strict=True)}
    for layer in find_layers(model):
        container = layer.experts
        if not isinstance(container, StandInExperts):
            continue
        experts = stock.get_submodule(layer.shape.name)
        write_rows(experts, container, range(container.num_experts))
        if container.post_expert_norm is not None:
            experts.post_expert_norm = container.post_expert_norm
        experts.config = configs[id(experts.config)]
        model.set_submodule(layer.shape.name, experts.train(container.training))
    del model.config.quantization_config
    save_as_stock(model)
    return model
