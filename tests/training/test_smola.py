"""Soft mixtures of low-rank experts beside MoE layers: nothing at first, then trained, saved, loaded and generating.

Letters: T tokens, N small experts, R rank, D model width.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.notes import plan_of
from locum.checkpoints.skeleton import read_shape
from locum.errors import OptionError
from locum.experts.policies.in_turn import InTurn
from locum.experts.policies.soft_lora import DOWN, PHI, UP, SoftLora
from locum.experts.policies.top_p import TopP
from locum.models.families import find_layers
from locum.training.context import Context
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from making.policies import logits, near, policy_plan
from making.tiny_models import tiny_ids, tiny_model
from making.training import QUICK, compressed, light, tiny_tokens

OURS = (PHI, DOWN, UP)


def mixtures(model):
    return [{leaf: layer.experts.get_parameter(leaf) for leaf in OURS} for layer in find_layers(model)]


def prepared(model, plan, **options):
    context = Context(model, plan, 6, 0)
    way = make_recovery({"how": "smola", **options}).way
    way.check(context)
    way.prepare(context, 0)
    return context, way


def test_the_mixture_is_the_sum_that_its_formula_says():
    policy, draw = SoftLora(3, 2), torch.Generator().manual_seed(0)
    shapes = policy.tensors(find_layers(tiny_model("olmoe"))[0].shape)
    tensors = {name: torch.randn(size, generator=draw, dtype=torch.float64) for name, size in shapes.items()}
    x_TD = torch.randn(5, 32, generator=draw, dtype=torch.float64)
    found_TD = policy.added(tensors, x_TD)
    for x_D, found_D in zip(x_TD, found_TD, strict=True):
        said = [float(tensors[PHI][n] @ x_D) for n in range(3)]
        total = sum(math.exp(z) for z in said)
        wanted_D = sum(math.exp(said[n]) / total * (tensors[UP][n] @ (tensors[DOWN][n] @ x_D)) for n in range(3))
        torch.testing.assert_close(found_D, wanted_D)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_beside_a_stock_model_it_changes_nothing_at_first(family):
    model = tiny_model(family)
    before = logits(model)
    context, _ = prepared(model, None)
    near(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer.shape.name}.{leaf}" for layer in find_layers(model) for leaf in OURS}
    for mixture in mixtures(context.model):
        assert not mixture[UP].any() and mixture[DOWN].any() and mixture[PHI].any()


def test_beside_stand_ins_and_another_policy_it_changes_nothing_at_first_and_then_adds_up():
    original = tiny_model("olmoe")
    plan = policy_plan(original, lambda _: TopP(0.6))
    model = compressed(original, plan)
    before = logits(model)
    prepared(model, plan, experts=3, rank=2)
    assert torch.equal(logits(model), before)
    assert {layer.experts.layout.routing for layer in find_layers(model)} == {InTurn((TopP(0.6), SoftLora(3, 2)))}
    experts = find_layers(model)[0].experts
    with torch.no_grad():
        experts.get_parameter(UP).normal_(generator=torch.Generator().manual_seed(1))
        x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
        index, weight = torch.arange(14).remainder(8).reshape(7, 2), torch.full((7, 2), 0.5)
        added = SoftLora(3, 2).added({leaf: experts.get_parameter(leaf) for leaf in OURS}, x_TD)
        whole = experts(x_TD, index, weight)
        experts.get_parameter(UP).zero_()
        near(whole - experts(x_TD, index, weight), added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_alone_is_trained_and_its_plan_says_so(dtype):
    original = tiny_model("olmoe").to(dtype)
    plan, tokens = light(original), tiny_tokens()
    small = compressed(original, plan)
    options = make_recovery({**QUICK, "how": "smola", "steps": 25, "learning_rate": 1e-2})
    model, summary = recover_model(copy.deepcopy(small), plan, tokens, tokens, options)
    assert summary["validation_loss"] < summary["validation_loss_before"] - 0.02
    after = options.way.becomes(plan, [layer.shape for layer in find_layers(small)])
    layouts = {layer.shape.name: layer.experts.layout for layer in find_layers(model)}
    assert all(after.layer(name).routing == layout.routing == SoftLora(8, 4) for name, layout in layouts.items())
    assert model.config.quantization_config.layers == {name: layout.to_json() for name, layout in layouts.items()}
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in small.state_dict().items())
    assert {now[name].dtype for name in now.keys() - small.state_dict().keys()} == {dtype}
    assert summary["trainable_parameters"] == sum(now[n].numel() for n in now.keys() - small.state_dict().keys())
    again, _ = recover_model(copy.deepcopy(model), after, tokens, None, make_recovery({**QUICK, "how": "smola"}))
    assert {layer.experts.layout.routing for layer in find_layers(again)} == {SoftLora(8, 4)}
    with pytest.raises(OptionError, match=r"has a mixture already.*give --experts 8 --rank 4"):
        prepared(model, after, experts=2)
    with pytest.raises(OptionError, match="--rank is 33; allowed: at most 32"):
        prepared(compressed(original, plan), plan, rank=33)


@pytest.mark.journeys
@pytest.mark.parametrize("which", ["checkpoint", "small"])
def test_its_checkpoint_loads_generates_and_goes_on(which, request, words, tmp_path):
    """Of a stock model and of a compressed one. Sizes are those that the plan says; batches and the cache change no token."""
    source, out = request.getfixturevalue(which), tmp_path / "out"
    asked = {"how": "smola", "data": str(words), "length": 32, "validation_tokens": 256, "batch_size": 2}
    said = locum.recover(source, out=out, steps=8, learning_rate=0.03, **asked)
    assert said["validation_loss"] < said["validation_loss_before"]
    model, plan = load_model(out, dtype=torch.float32), plan_of(out)
    assert all(mixture[UP].any() for mixture in mixtures(model))
    assert all(SoftLora(8, 4) == layer.routing for layer in plan.layers)
    beside = sum(p.numel() for mixture in mixtures(model) for p in mixture.values())
    assert beside == said["trainable_parameters"]
    assert read_shape(out).parameters == read_shape(source).parameters + beside
    ids = tiny_ids(3, 6, vocab=100)
    asked_for = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **asked_for)
    for row, found in zip(ids, together, strict=True):
        alone = model.generate(
            row[None], attention_mask=torch.ones(1, 6, dtype=torch.long), use_cache=False, **asked_for
        )
        assert torch.equal(alone[0], found)
    again = locum.recover(out, out=tmp_path / "again", steps=2, learning_rate=0.01, **asked)
    assert again["validation_loss_before"] == pytest.approx(said["validation_loss"], abs=1e-3)
