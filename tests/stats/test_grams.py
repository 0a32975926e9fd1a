"""Gram matrices of experts' inputs and hidden states, collected on demand from real models, and what whitening does there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from locum.checkpoints.application import apply_plan
from locum.measure.calibration import calibrate
from locum.methods.decompose import Decompose
from locum.methods.lightmoe import LightMoE
from locum.models.families import find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.plan import make_plan
from making.handmade import layers_of, tokens_of
from making.oracles import expert_parts
from making.tiny_models import tiny_ids, tiny_model

GRAMS = ("input_gram", "hidden_gram")


def slow_grams(model: PreTrainedModel, ids_BS: Tensor, keep_BS: Tensor) -> dict[str, dict[str, Tensor]]:
    """From the arguments of every experts module, one pair at a time."""
    layers = {layer.shape.name: layer for layer in find_layers(model)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str):
        return lambda _module, args: seen.update({name: (args[0].reshape(-1, args[0].shape[-1]), args[1])})

    hooks = [layer.experts.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(ids_BS, attention_mask=keep_BS.long())
    for hook in hooks:
        hook.remove()
    result = {}
    for name, layer in layers.items():
        shape = layer.shape
        inputs = torch.zeros(shape.num_experts, shape.hidden_size, shape.hidden_size, dtype=torch.float64)
        hidden = torch.zeros(shape.num_experts, shape.expert_width, shape.expert_width, dtype=torch.float64)
        x_TD, index_TK = seen[name]
        for t in keep_BS.flatten().nonzero().flatten().tolist():
            for e in index_TK[t].tolist():
                weights, x_D = read_expert(layer.experts, e), x_TD[t].detach()
                h_F = functional.silu(weights.gate_FD.detach() @ x_D) * (weights.up_FD.detach() @ x_D)
                inputs[e] += torch.outer(x_D, x_D).double()
                hidden[e] += torch.outer(h_F, h_F).double()
        result[name] = {"input_gram": inputs, "hidden_gram": hidden}
    return result


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_grams_equal_a_slow_loop_without_padding(model_type: str) -> None:
    model, ids_BS = tiny_model(model_type), tiny_ids(2, 10)
    keep_BS = torch.ones_like(ids_BS).bool()
    keep_BS[1, 6:] = False
    tokens = dataclasses.replace(tokens_of(ids_BS), attention_BS=keep_BS.long())
    statistics = calibrate(model, tokens, needs=GRAMS, batch_size=2)
    for name, expected in slow_grams(model, ids_BS, keep_BS).items():
        for gram in GRAMS:
            torch.testing.assert_close(statistics.layer(name)[gram], expected[gram], rtol=1e-4, atol=1e-5)


def test_grams_add_nothing_to_what_else_is_collected() -> None:
    model, tokens = tiny_model("olmoe"), tokens_of(tiny_ids(2, 10))
    default, more = calibrate(model, tokens), calibrate(model, tokens, needs=("count", "output_sum", *GRAMS))
    assert not set(default.names) & set(GRAMS)
    for name in default.layers:
        for shared in ("count", "output_sum"):
            assert torch.equal(default.layers[name][shared], more.layers[name][shared])


@pytest.mark.parametrize(
    "method", [Decompose(start="whitened", multiple=1), LightMoE(start="whitened", rank=2, bases=1)]
)
def test_whitened_experts_are_nearer_on_what_they_were_given(method: object) -> None:
    """The first layer's inputs stay what they were, so there each approximation of gate and up can be compared."""
    ids_BS = tiny_ids(8, 32)
    errors = {}
    statistics = calibrate(tiny_model("olmoe"), tokens_of(ids_BS), needs=method.needs())
    for start in ("whitened", "svd"):
        model = tiny_model("olmoe")
        old = {e: read_expert(find_layers(model)[0].experts, e).map(lambda _, t: t.clone()) for e in range(8)}
        chosen = dataclasses.replace(method, start=start)
        plan = make_plan(shape_of(model), layers_of(chosen, statistics, shape_of(model), 0.6))
        assert ("input_gram" in plan.needs) == (start == "whitened")
        container = apply_plan(model, plan, statistics).get_submodule(plan.layers[0].layer)
        gram_EDD = statistics.layer(plan.layers[0].layer)["input_gram"]
        errors[start] = [
            float(torch.einsum("fd,de,fe->", rest, gram_EDD[e], rest))
            for e in plan.layers[0].replaced
            for rest in [(old[e].gate_up_GD - expert_parts(container, e)["W1"]).detach().double()]
        ]
    assert errors["svd"] and all(a <= b * (1 + 1e-6) for a, b in zip(*errors.values(), strict=True))
    assert sum(errors["whitened"]) < 0.9 * sum(errors["svd"])
