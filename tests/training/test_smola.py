"""Soft mixtures of low-rank experts beside MoE layers: nothing at first, then trained, saved, loaded and generating.

Letters: T tokens, N small experts, R rank, D model width.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.notes import plan_of
from locum.checkpoints.patch import load_adapter
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.weight_files import ADAPTER
from locum.errors import CheckpointError, OptionError, PlanError, UnsupportedModel
from locum.experts.policies.in_turn import InTurn
from locum.experts.policies.policy import read_policy
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


def written_out(tensors, end, x_D):
    """What one set adds for one token, expert by expert."""
    phi, down, up = (tensors[leaf + end] for leaf in OURS)
    said = [math.exp(float(phi_D @ x_D)) for phi_D in phi]
    return sum(share / sum(said) * (up[n] @ (down[n] @ x_D)) for n, share in enumerate(said))


def test_what_is_added_is_the_sum_over_sets_that_their_formula_says():
    one, other, draw = SoftLora(3, 2), SoftLora(2, 1, "math-2"), torch.Generator().manual_seed(0)
    policy = InTurn((one, other))
    shapes = policy.tensors(find_layers(tiny_model("olmoe"))[0].shape)
    assert len(shapes) == 6 and shapes[f"{UP}_math-2"] == (2, 32, 1)
    tensors = {name: torch.randn(size, generator=draw, dtype=torch.float64) for name, size in shapes.items()}
    x_TD = torch.randn(5, 32, generator=draw, dtype=torch.float64)
    for x_D, one_D, both_D in zip(x_TD, one.added(tensors, x_TD), policy.added(tensors, x_TD), strict=True):
        torch.testing.assert_close(one_D, written_out(tensors, "", x_D))
        torch.testing.assert_close(both_D, written_out(tensors, "", x_D) + written_out(tensors, "_math-2", x_D))


def test_a_set_without_a_name_is_written_as_it_was_before_sets_had_names():
    said = {"policy": "soft_lora", "experts": 3, "rank": 2}
    assert SoftLora(3, 2).to_json() == said and read_policy(said) == SoftLora(3, 2)
    assert SoftLora(3, 2).leaves == OURS
    named = SoftLora(3, 2, "math")
    assert named.to_json() == {**said, "set": "math"} and read_policy(named.to_json()) == named


def test_sets_of_a_layer_stand_side_by_side_and_one_of_the_same_name_takes_the_place():
    one, math, more = SoftLora(3, 2), SoftLora(3, 2, "math"), SoftLora(2, 1, "math")
    assert InTurn.of(InTurn.of(TopP(0.6), one), math) == InTurn((TopP(0.6), one, math))
    assert InTurn.of(InTurn((one, math)), more) == InTurn((one, more))
    assert InTurn.of(math, more) == more


@pytest.mark.parametrize("name", ["a b", "a.b", "é", "a\n", "../a", "a" * 65, 3, None])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(
        PlanError, match=r"the plan has a set called .*; allowed: names of up to 64 letters, digits, - and _"
    ):
        SoftLora(3, 2, name).check("the plan", None)
    with pytest.raises(OptionError, match=r"--how smola trains no set called .*; allowed|--set is .* it takes text"):
        make_recovery({"how": "smola", "set": name})


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


def test_a_set_is_added_trained_and_gone_on_with_while_the_others_stay_to_the_bit():
    original = tiny_model("olmoe")
    plan, tokens = light(original), tiny_tokens()

    def train(model, plan, **options):
        options = make_recovery({**QUICK, "how": "smola", "learning_rate": 1e-2, **options})
        becomes = options.way.becomes(plan, [layer.shape for layer in find_layers(model)])
        return recover_model(copy.deepcopy(model), plan, tokens, None, options)[0], becomes

    one, first = train(compressed(original, plan), plan)
    both, second = train(one, first, set="math", experts=3, rank=2, seed=1)
    gone_on, third = train(both, second, set="math", experts=3, rank=2)
    policy = InTurn((SoftLora(8, 4), SoftLora(3, 2, "math")))
    assert {layer.experts.layout.routing for layer in find_layers(both)} == {layer.routing for layer in second.layers}
    assert {layer.routing for layer in second.layers} == {policy} and third == second
    assert sum("math" in name for name in both.state_dict()) == 3 * len(second.layers)
    for before, after in ((one, both), (both, gone_on)):
        now = after.state_dict()
        changed = {name for name, tensor in before.state_dict().items() if not torch.equal(now[name], tensor)}
        assert {name for name in changed if "math" not in name} == set()
    assert any(changed)  # of the last pair: the set that went on
    for leaf in OURS:
        assert not torch.equal(both.state_dict()[f"{first.layers[0].layer}.{leaf}_math"][:1], torch.zeros(1))
    with pytest.raises(OptionError, match=r"set math; give --experts 3 --rank 2, or another --set"):
        prepared(both, second, set="math")
    logits_before = logits(both)
    prepared(both, second, set="code", rank=1)
    assert torch.equal(logits(both), logits_before)


@pytest.mark.parametrize("names", [("", "gamma"), ("gate_proj", "-"), ("0", "weight_g")])
def test_sets_of_any_name_are_saved_and_loaded(names, tmp_path):
    original, policy = tiny_model("olmoe"), InTurn(tuple(SoftLora(2, 3, name) for name in names))
    model = compressed(original, policy_plan(original, lambda _: policy))
    assert torch.equal(logits(model), logits(compressed(original, policy_plan(original, lambda _: SoftLora(1, 1)))))
    with torch.no_grad():
        for layer in find_layers(model):
            for parameter in layer.experts.parameters():
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype=torch.float32)
    assert {layer.experts.layout.routing for layer in find_layers(again)} == {policy}
    assert torch.equal(logits(again), logits(model))


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


@pytest.mark.journeys
def test_a_second_set_beside_the_first_one_is_saved_with_it(checkpoint, words, tmp_path):
    asked = {"how": "smola", "data": str(words), "length": 32, "validation_tokens": 256, "batch_size": 2, "steps": 8}
    locum.recover(checkpoint, out=tmp_path / "one", learning_rate=0.03, set="a", **asked)
    locum.recover(tmp_path / "one", out=tmp_path / "both", learning_rate=0.03, set="b", experts=3, rank=2, **asked)
    one, both = (load_model(tmp_path / name, dtype=torch.float32) for name in ("one", "both"))
    policy = InTurn((SoftLora(8, 4, "a"), SoftLora(3, 2, "b")))
    assert {layer.routing for layer in plan_of(tmp_path / "both").layers} == {policy}
    said = json.loads((tmp_path / "both" / "plan.json").read_text())["layers"][0]["policy"]["policies"]
    assert said[1] == {"policy": "soft_lora", "experts": 3, "rank": 2, "set": "b"}
    now = both.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in one.state_dict().items())
    assert all(now[name].any() for name in now.keys() - one.state_dict().keys())
    ids = tiny_ids(2, 6, vocab=100)
    found = both.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert found.shape == (2, 14)
    with pytest.raises(UnsupportedModel, match="a routing policy"):
        locum.export(tmp_path / "both", to="gguf", out=tmp_path / "file.gguf")


@pytest.mark.journeys
@pytest.mark.parametrize("which", ["checkpoint", "small"])
def test_sets_are_small_files_that_are_put_together_and_left_away(which, request, words, tmp_path):
    """Over a stock model and over a compressed one, which both stay as they are."""
    source = request.getfixturevalue(which)
    asked = {"how": "smola", "data": str(words), "length": 32, "validation_tokens": 256, "batch_size": 2, "steps": 4}
    asked |= {"adapter_only": True, "learning_rate": 0.03}
    locum.recover(source, out=tmp_path / "a", set="a", **asked)
    locum.recover(source, out=tmp_path / "b", set="b", experts=3, rank=2, **asked)
    locum.recover(tmp_path / "a", out=tmp_path / "ab", set="b", rank=2, **asked)
    a, b, ab, bare = (load_model(x, dtype=torch.float32) for x in (*(tmp_path / n for n in ("a", "b", "ab")), source))
    tensors = load_file(tmp_path / "a" / ADAPTER)
    assert all("router" in name or ".gate." in name or name.endswith("_a") for name in tensors)
    assert all(torch.equal(ab.state_dict()[name], tensor) for name, tensor in tensors.items())
    both = load_adapter(load_adapter(copy.deepcopy(bare), tmp_path / "a"), tmp_path / "b")
    policy = InTurn((SoftLora(8, 4, "a"), SoftLora(3, 2, "b")))
    assert {layer.experts.layout.routing for layer in find_layers(both)} == {policy}
    now = both.state_dict()
    for one, end in ((a, "_a"), (b, "_b")):
        assert all(torch.equal(now[name], x) for name, x in one.state_dict().items() if name.endswith(end))
        assert all(torch.equal(now[name], x) for name, x in one.state_dict().items())
    assert torch.equal(logits(load_adapter(bare, tmp_path / "b")), logits(b)) and not torch.equal(logits(a), logits(b))
    both.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load_model(tmp_path / "whole")), logits(both))
    with pytest.raises(CheckpointError, match="not what the adapter was made for"):
        load_adapter(ab, tmp_path / "b")
    near(logits(ab), logits(load_model(tmp_path / "ab")), 0)
