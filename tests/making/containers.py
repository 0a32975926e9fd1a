"""Containers of every kind filled with random numbers, routing for them, and how near two results are.

Sizes: E experts, D hidden size, F width of an expert.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.containers.stack import Stack
from locum.experts.weights import ExpertWeights
from locum.models.families import canonical_activation, find_layers
from locum.plans.plan import KEPT, Base, LayerPlan, stand_in
from locum.shapes import LayerShape
from locum.training.experts import TrainingExperts
from making.oracles import expert_parts, random_layer_plan, slow_experts
from making.tiny_models import tiny_model

D, F, E = 12, 10, 8


def swiglu(pre):
    gate, up = pre.chunk(2, dim=-1)
    return functional.silu(gate) * up


def relu_squared(pre):
    return functional.relu(pre).square()


clamped_swiglu = canonical_activation(find_layers(tiny_model("gpt_oss", num_hidden_layers=1))[0].experts)
KINDS = {
    "swiglu": (swiglu, True, False),
    "gpt_oss": (clamped_swiglu, True, True),
    "no_gate": (relu_squared, False, False),
}
KINDS["no_gate_bias"] = (relu_squared, False, True)


def layer_shape(has_gate=True, has_bias=False, experts=E):
    return LayerShape("experts", experts, 2, D, F, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)


def layer_of(kind="swiglu"):
    _, has_gate, has_bias = KINDS[kind]
    return layer_shape(has_gate, has_bias)


def drawn_experts(kind, dtype=torch.float32):
    _, has_gate, has_bias = KINDS[kind]
    generator = torch.Generator().manual_seed(1)

    def drawn(*size):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    return [
        ExpertWeights(
            drawn(F, D) if has_gate else None,
            drawn(F, D),
            drawn(D, F),
            drawn(F) if has_gate and has_bias else None,
            drawn(F) if has_bias else None,
            drawn(D) if has_bias else None,
        )
        for _ in range(E)
    ]


def filled(layout, activate, dtype=torch.float32, seed=0, kind=StandInExperts):
    container = kind(layout, activate, dtype, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in container.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return container


def random_container(kind, seed, dtype=torch.float32, annealed=False):
    activate, has_gate, has_bias = KINDS[kind]
    shape = layer_shape(has_gate, has_bias)
    plan = random_layer_plan(shape, seed)
    container = filled(Layout.of(plan, shape), activate, dtype, seed, TrainingExperts if annealed else StandInExperts)
    if annealed:
        anneal(container, plan, dtype)
    return container


def anneal(container, plan, dtype, beta=0.3):
    """What recovery does to it: bases in a stack of their own, old weights of some stand-ins beside them."""
    num_kept = sum(slot.is_kept for slot in plan.slots)
    container.split_bases(num_kept)
    replaced = [i for i, e in enumerate(plan.survivors) if not plan.slots[e].is_kept][::2]
    shapes = {"gate_up_NGD": (F * (2 if container.layout.has_gate else 1), D), "down_NDF": (D, F)}
    if container.layout.has_bias:
        shapes |= {"gate_up_bias_NG": shapes["gate_up_NGD"][:1], "down_bias_ND": (D,)}
    if replaced:
        old = {n: torch.randn(len(replaced), *s, dtype=torch.float64).to(dtype) * 0.4 for n, s in shapes.items()}
        container.old = Stack.holding(old)
        container.old_of = tuple(replaced.index(i) if i in replaced else -1 for i in range(len(plan.survivors)))
        container.beta = beta
    container.requires_grad_(True)


def routing(experts, tokens, top_k, seed=0, dtype=torch.float32, distinct=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    if distinct:
        index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    else:
        index = torch.randint(experts, (tokens, top_k), generator=generator)
    gates = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(dtype)
    return x, index, gates


def slow(container, x, index, gates):
    return slow_experts(lambda e: expert_parts(container, e), container.activate, x, index, gates)


def assert_near(actual, expected, relative):
    assert actual.shape == expected.shape
    if expected.numel():
        scale = expected.detach().abs().max().clamp(min=1e-30)
        assert float((actual - expected).detach().abs().max() / scale) <= relative


def relative_error(actual, expected):
    return float((actual.detach().to(expected.dtype) - expected.detach()).norm() / expected.detach().norm())


def shared_base_container(members=4, rank=2, constant=False):
    slots = [KEPT] * (E - members) + [stand_in(base=0, rank=rank, constant=constant)] * members
    plan = LayerPlan("experts", tuple(slots), (Base(tuple(range(E - members, E)), (1 / members,) * members),))
    return filled(Layout.of(plan, layer_shape()), swiglu)
