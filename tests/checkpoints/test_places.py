"""Containers under the names that other classes of a family give their layers, and the class that opens a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModel, AutoModelForCausalLM

import locum
from families.tiny_families import decorated_families, tiny
from locum.checkpoints.application import apply_plan
from locum.checkpoints.card import model_card
from locum.checkpoints.placing import by_place, containers_of
from locum.checkpoints.read import read_config
from locum.checkpoints.skeleton import read_shape
from locum.engines.run import in_transformers
from locum.models.families import opening_class
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, make_plan, stand_in
from making.checkpoints import write_checkpoint, write_tokenizer
from making.tiny_models import tiny_ids, tiny_model


def light(shape):
    """Two merged stand-ins and a dropped expert in every layer."""
    slots = (DROPPED, *[KEPT] * 5, *[stand_in(0, 2)] * 2)
    return make_plan(shape, [LayerPlan(x.name, slots, (Base((6, 7), (0.5, 0.5)),)) for x in shape.layers])


def write_family(folder, family, **changes):
    model = tiny(family, vocab_size=320, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "deepseek_v3"])
def test_the_bare_model_of_a_compressed_checkpoint(model_type, tmp_path):
    source = write_checkpoint(tmp_path / "source", model_type)
    out = locum.apply(source, plan=uneven_of(read_shape(source)), out=tmp_path / "small")
    whole, bare = AutoModelForCausalLM.from_pretrained(out).eval(), AutoModel.from_pretrained(out).eval()
    assert len(containers_of(bare)) == len(containers_of(whole)) > 0
    with torch.no_grad():
        assert torch.equal(bare(tiny_ids()).last_hidden_state, whole.model(tiny_ids()).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    again = AutoModel.from_pretrained(tmp_path / "bare").eval()
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).last_hidden_state, bare(tiny_ids()).last_hidden_state)


def uneven_of(shape):
    """In two groups of four, where routers have groups, one expert of each is dropped."""
    slots = (DROPPED, *[KEPT] * 3, DROPPED, KEPT, *[stand_in(0, 2)] * 2)
    return make_plan(shape, [LayerPlan(x.name, slots, (Base((6, 7), (0.5, 0.5)),)) for x in shape.layers])


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_a_vision_language_model_opens_by_the_class_that_is_named(family, tmp_path):
    if family not in decorated_families():
        pytest.skip("this transformers has no such family")
    source = write_family(tmp_path / "source", family)
    shape = read_shape(source)
    out = locum.apply(source, plan=light(shape), out=tmp_path / "small")
    opens = opening_class(read_config(out))
    assert opens != "AutoModelForCausalLM" and opens.startswith("AutoModel")
    card = (out / "README.md").read_text()
    assert f"from transformers import {opens}\n" in card and f"{opens}.from_pretrained(" in card
    job = {
        "folder": str(out),
        "adapter": None,
        "dtype": "float32",
        "import_locum": True,
        "opens": opens,
        "device": "cpu",
    }
    said = in_transformers(job | {"prompts": [[5, 6, 7]], "new_tokens": 2}, tmp_path)
    assert said["keys"] == {} and len(said["tokens"][0]) == 2
    if family == "qwen3_5_moe":  # its class for text alone has no towers, and other names
        text = AutoModelForCausalLM.from_pretrained(out).eval()
        whole = getattr(transformers, opens).from_pretrained(out).eval()
        with torch.no_grad():
            assert torch.equal(text(tiny_ids()).logits, whole(tiny_ids()).logits)


def test_a_layer_that_could_be_meant_twice_is_no_place():
    found = ["a.layers.0.mlp.experts", "b.layers.0.mlp.experts", "b.layers.1.mlp.experts"]
    assert by_place("b.layers.0.mlp.experts", found) == "b.layers.0.mlp.experts"
    assert by_place("model.layers.0.mlp.experts", found) is None
    assert by_place("model.layers.1.mlp.experts", found) == "b.layers.1.mlp.experts"
    assert by_place("model.layers.2.mlp.experts", found) is None


def test_text_models_open_as_before(checkpoint):
    assert opening_class(read_config(checkpoint)) == "AutoModelForCausalLM"


EVIL = "x`\n\n<img src=x onerror=alert(1)>\n\n# Verified by the hub\n| a [b](http://c) ![d](e)"


def test_text_of_a_plan_does_nothing_in_the_card(checkpoint):
    shape = read_shape(checkpoint)
    plan = make_plan(shape, light(shape).layers, method=EVIL, options={EVIL: EVIL})
    calm = make_plan(shape, light(shape).layers, method="x", options={"x": "x"})
    card, plain = (
        model_card(p, shape, name, {name: name, "original": name}, "AutoModelForCausalLM", ModelCardData(tags=[name]))
        for p, name in ((plan, EVIL), (calm, "x"))
    )
    card, plain = (ModelCard(one).text for one in (card, plain))  # the head is YAML
    before, call, after = card.split("```")
    outside, ours = before + after, "".join(plain.split("```")[::2])
    assert not any(odd in outside for odd in ("<img", "[b]("))
    assert outside.replace("\\`", "").count("`") == ours.count("`")
    heads = [[line for line in text.splitlines() if line.startswith("#")] for text in (outside, ours)]
    assert len(heads[0]) == len(heads[1]) and len(card.splitlines()) == len(plain.splitlines())
    assert json.dumps(EVIL) in call  # as Python has it


def test_router_logits_are_not_asked_of_layers_that_differ(tmp_path):
    """Families make one loss of them, by one number of experts; where numbers differ, generation would end in an error."""
    source = write_checkpoint(tmp_path / "source", output_router_logits=True)
    shape = read_shape(source)
    fewer = [LayerPlan(shape.layers[0].name, (DROPPED, *[KEPT] * 7))]
    uneven = locum.apply(source, plan=make_plan(shape, fewer), out=tmp_path / "uneven")
    even = [LayerPlan(x.name, (DROPPED, *[KEPT] * 7)) for x in shape.layers]
    even = locum.apply(source, plan=make_plan(shape, even), out=tmp_path / "even")
    same = [
        LayerPlan(x.name, (stand_in(0, 2), stand_in(0, 2), *[KEPT] * 6), (Base((0, 1), (0.5, 0.5)),))
        for x in shape.layers
    ]
    same = locum.apply(source, plan=make_plan(shape, same), out=tmp_path / "same")
    for folder, asked in ((uneven, False), (even, True), (same, True)):
        config = json.loads((folder / "config.json").read_text())
        assert config["output_router_logits"] is asked, folder
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(tiny_ids(), labels=tiny_ids()).loss.isfinite()
        assert model.generate(tiny_ids()[:1], max_new_tokens=2, do_sample=False).shape == (1, 26)
    config = json.loads((uneven / "config.json").read_text())  # as an earlier Locum wrote it
    (uneven / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    assert AutoModelForCausalLM.from_pretrained(uneven)(tiny_ids(), labels=tiny_ids()).loss.isfinite()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_a_model_that_was_pruned_in_memory_balances_by_its_own_number_of_experts(family):
    """As `locum verify` has it, and Python users: before it was ever saved and loaded."""
    model = tiny_model(family)
    model.config.output_router_logits = True
    layers = [LayerPlan(x.name, (DROPPED, DROPPED, *[KEPT] * 6)) for x in shape_of(model).layers]
    apply_plan(model, make_plan(shape_of(model), layers))
    answer = model(tiny_ids(), labels=tiny_ids(), output_router_logits=True)
    assert answer.loss.isfinite() and answer.aux_loss.isfinite()
    assert {logits.shape[-1] for logits in answer.router_logits} == {6}
