"""Real tiny models in which something is planted, and what becomes of them when a plan is applied."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locum.checkpoints.application import apply_plan
from locum.experts.weights import ExpertWeights, permute_hidden
from locum.measure.calibration import calibrate
from locum.models.families import MoeLayer, find_layers, read_expert, write_expert
from locum.models.sizes import shape_of
from locum.plans.plan import LayerPlan, make_plan
from locum.stats.sums import Statistics
from making.handmade import tokens_of
from making.tiny_models import tiny_ids, tiny_model

IDS = tiny_ids(6, 32)
TWINS = {1: (1, 3, 5), 0: (0, 2, 6)}  # each triple is one expert three times


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def measured(model: PreTrainedModel) -> Statistics:
    return calibrate(model, tokens_of(IDS))


def compressed(model: PreTrainedModel, layers: list[LayerPlan], statistics: Statistics | None = None) -> Tensor:
    """The model's logits after the plan is applied to it."""
    return logits(apply_plan(model, make_plan(shape_of(model), layers), statistics))


def edit(layer: MoeLayer, experts: dict[int, ExpertWeights]) -> None:
    for e, weights in experts.items():
        write_expert(layer.experts, e, weights)


def copy_of(layer: MoeLayer, e: int) -> ExpertWeights:
    return read_expert(layer.experts, e).map(lambda _, tensor: tensor.clone())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def with_twins(permuted: bool, model_type: str = "olmoe", length: float = 0.4, step: float = 0.01) -> PreTrainedModel:
    """Top-1 routing among experts 0, 1, 4 and 7; the copies of 0 and 1 have the same weights and router rows.

    Their router rows are short (of this share of their length), so that 4 and 7 take most tokens, and those of the copies shorter
    by a step still, so that it does not hang on rounding which of three equal experts a token selects. If `permuted`, the copies' hidden units are shuffled,
    which leaves what they compute as it was.
    """
    model = tiny_model(model_type, num_experts_per_tok=1)
    for number, layer in enumerate(find_layers(model)):
        with torch.no_grad():
            for original, copies in TWINS.items():
                layer.router.weight[original] *= length
                for number_of_copy, e in enumerate(c for c in copies if c != original):
                    layer.router.weight[e] = layer.router.weight[original] * (1 - step * (1 + number_of_copy))
        for original, copies in TWINS.items():
            weights = copy_of(layer, original)
            for e in copies:
                generator = torch.Generator().manual_seed(100 * number + e)
                order = torch.randperm(weights.up_FD.shape[0], generator=generator)
                edit(layer, {e: permute_hidden(weights, order) if permuted and e != original else weights})
    return model
