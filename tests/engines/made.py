"""The checkpoints that engines are tried on: models, and plans that between them have every form that Locum writes.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from locum.bundled import MODEL as REFERENCE
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.containers.container import StandInExperts
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot, make_plan, stand_in
from locum.shapes import LayerShape, ModelShape
from locum.stats.origin import Origin
from locum.stats.sums import Statistics
from making.slots import base_of
from making.tiny_models import tiny_model

ROOM = {"vocab_size": 320, "max_position_embeddings": 512, "hidden_size": 64, "num_hidden_layers": 3}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
ROUTED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # in real config.json files; transformers has no need
SIZES = {  # what vLLM's attention on CPU can do, heads of 32 and one size of latent; experts that it need not pad
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 32},
    "mixtral": {"head_dim": 32, "intermediate_size": 32},
    # llama.cpp takes models of this class without the first of these only at the sizes of the lite ones
    "deepseek_v3": {**LATENT, **ROUTED, "q_lora_rank": 24, "moe_intermediate_size": 32},
}


def original(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """The bundled, trained model, or a tiny random one of a family."""
    if family == "reference":
        return load_model(REFERENCE, dtype=dtype)
    return tiny_model(family, **ROOM, **SIZES[family]).to(dtype)


def cycle(layer: LayerShape, *pattern: Slot) -> tuple[Slot, ...]:
    """The pattern again and again: equally many dropped experts in every group of a router that has groups."""
    return tuple(pattern[e % len(pattern)] for e in range(layer.num_experts))


def members(slots: tuple[Slot, ...], base: int) -> Base:
    experts = tuple(e for e, slot in enumerate(slots) if base_of(slot) == base)
    return Base(experts, (1 / len(experts),) * len(experts))


def lightmoe(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Shared bases with an adapter per member (LightMoE); the last layer stays stock."""
    plans = []
    for layer in layers[:-1]:
        slots = cycle(layer, KEPT, stand_in(0, 4), KEPT, stand_in(1, 3, "svd"))
        plans.append(LayerPlan(layer.name, slots, (members(slots, 0), members(slots, 1))))
    return plans


def low_rank(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Experts dropped, and a rank for each of the others (MoE-I2)."""
    pattern = (DROPPED, stand_in(None, 8, "svd"), stand_in(None, 12, "svd"), KEPT)
    return [LayerPlan(layer.name, cycle(layer, *pattern)) for layer in layers]


def uneven(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Pruned to other numbers of experts in the first layers; the others stay stock."""
    patterns = ((KEPT, KEPT, KEPT, DROPPED), (KEPT, DROPPED))
    return [LayerPlan(layer.name, cycle(layer, *pattern)) for layer, pattern in zip(layers, patterns, strict=False)]


def merged(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Experts that share their mean."""
    plans = []
    for layer in layers:
        slots = cycle(layer, KEPT, stand_in(0), stand_in(1), stand_in(1))
        plans.append(LayerPlan(layer.name, slots, (members(slots, 0), members(slots, 1))))
    return plans


def constants(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Experts that put out a constant (MoNE), and some that put out nothing."""
    pattern = (KEPT, stand_in(constant=True), KEPT, NOTHING)
    return [LayerPlan(layer.name, cycle(layer, *pattern)) for layer in layers]


def vectors(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Fewer main experts, vectors for the others (Compressed Experts); here on top of stand-ins and dropped experts."""
    pattern = (KEPT, stand_in(None, 8, "svd"), KEPT, DROPPED)
    return [
        LayerPlan(
            layer.name,
            cycle(layer, *pattern),
            routing=MainWithVectors(layer.top_k - 1, ("projections", "hidden")[i % 2]),
        )
        for i, layer in enumerate(layers)
    ]


def uniform(layers: tuple[LayerShape, ...]) -> list[LayerPlan]:
    """Pruned to one number of experts: a stock checkpoint."""
    return [LayerPlan(layer.name, cycle(layer, KEPT, KEPT, KEPT, DROPPED)) for layer in layers]


PLANS: dict[str, Callable[[tuple[LayerShape, ...]], list[LayerPlan]]] = {
    f.__name__: f for f in (lightmoe, low_rank, uneven, merged, constants, vectors, uniform)
}


def together(*kinds: Callable[[tuple[LayerShape, ...]], list[LayerPlan]]) -> Callable[..., list[LayerPlan]]:
    """One kind in each layer: of several kinds in one checkpoint, and one start of an engine."""
    return lambda layers: [kind(layers)[i] for i, kind in enumerate(kinds)]


MIXED = {"mixed_1": together(lightmoe, low_rank, constants), "mixed_2": together(uneven, merged, vectors)}


def statistics(shape: ModelShape, generator: torch.Generator) -> Statistics:
    """Statistics that have nothing but mean outputs, drawn at random: of size one for every token."""
    layers = {
        x.name: {
            "output_sum": torch.randn(1, x.num_experts, x.hidden_size, generator=generator, dtype=torch.float64),
            "count": torch.ones(1, x.num_experts, dtype=torch.float64),
        }
        for x in shape.layers
    }
    return Statistics(("all",), layers, Origin(shape, "by hand", "by hand", ("by hand",)), 1)


def make(folder: Path, family: str, plan_name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, int]:
    """Write a compressed checkpoint; returns the model and the bytes that its plan promised."""
    model = original(family, dtype)
    shape = shape_of(model)
    plan = make_plan(shape, (PLANS | MIXED)[plan_name](shape.layers))
    generator = torch.Generator().manual_seed(5)
    apply_plan(model, plan, statistics(shape, generator))
    for module in model.modules():
        if isinstance(module, StandInExperts) and module.policy_tensors:  # as if they had been trained
            module.offsets_NV.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return model, plan.size(shape).bytes
