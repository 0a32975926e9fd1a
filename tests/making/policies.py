"""Models whose layers have a routing policy and every expert kept, and how near their answers are."""

from __future__ import annotations

import torch

from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, make_plan
from making.tiny_models import tiny_ids

TOP_4 = {"num_experts_per_tok": 4}


def policy_plan(model, make=lambda layer: MainWithVectors(layer.top_k // 2)):
    shape = shape_of(model)
    return make_plan(shape, [LayerPlan(x.name, (KEPT,) * x.num_experts, routing=make(x)) for x in shape.layers])


def drawn(model, seed=0):
    """The model with vectors as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in find_layers(model):
            if getattr(layer.experts, "offsets_NV", None) is not None:
                layer.experts.offsets_NV.normal_(0, 0.3, generator=generator)
    return model


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tiny_ids(vocab=120) if ids is None else ids, use_cache=False).logits


def near(a, b, limit=1e-5):
    assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))
