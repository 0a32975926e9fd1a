"""The suite over every family, what each exception is needed for, and that docs/families.md is current.

Without `-m families` only a sample runs; `make families` runs everything and writes the page.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import locum.models.families
from families import matrix
from families.case import Case, NotApplicable, low_rank, near, stored
from families.checks import CHECKS
from families.tiny_families import (
    adapted_families,
    all_families,
    config_types,
    decorated_families,
    empty_other,
    main_type,
    other_families,
    refused_with,
    tiny,
    tiny_config,
)
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.skeleton import read_shape
from locum.errors import LocumError, PlanError, UnsupportedModel
from locum.models.families import FAMILIES, Family, family_of, find_layers, model_class
from locum.models.routers import RouterRule
from locum.models.sizes import shape_of
from locum.models.stored import write_model
from locum.plans.plan import DROPPED, KEPT, NOTHING, LayerPlan, make_plan, stand_in
from locum.training.layer import close_layer, open_layer, open_rows
from making.checkpoints import write_text, write_tokenizer
from making.tiny_models import CONFIGS

SAMPLE = (*CONFIGS, "gemma4", "inkling", "ernie4_5_moe", "nemotron_h", "aria", "deepseek_v4", "step3p7")
ROWS = [name for name in FAMILIES if name in CONFIG_MAPPING]  # the installed transformers may lack some
PLAIN = ("inkling2_loop",)  # refused for its files and its loop: its router follows the rule


def empty(model_type):
    with torch.device("meta"):
        config = tiny_config(model_type)
        return model_class(config)._from_config(config, dtype=torch.float32)


def marked(family):
    return family if family in SAMPLE else pytest.param(family, marks=pytest.mark.families)


@lru_cache(maxsize=1)
def case_of(family):
    return Case(family)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", [marked(family) for family in all_families()])  # outermost: one case for all
def test_family(family, check):
    rule = family_of(main_type(family))
    try:
        CHECKS[check](case_of(family))
    except NotApplicable as reason:
        pytest.skip(str(reason))
    except LocumError as error:
        stated = rule.refuse or rule.refuse_dropping
        assert stated and stated in str(error)
    else:
        assert not rule.refuse


@pytest.mark.parametrize("said", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", [marked(f) for f in all_families() if not family_of(main_type(f)).refuse])
def test_files_in_bfloat16_stay_what_they_are(family, said, tmp_path):
    """Whatever the config calls them, and whatever transformers makes of them in memory."""
    tiny(family).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps(config | {"dtype": said}))
    model, shape = load_model(tmp_path / "original"), read_shape(tmp_path / "original")
    assert replace(shape, notes=()) == shape_of(model)
    write_model(model, tmp_path / "again")
    headers = [read_headers(tmp_path / which) for which in ("original", "again")]
    assert headers[0].keys() == headers[1].keys()
    assert {n: e["dtype"] for n, e in headers[0].items()} == {n: e["dtype"] for n, e in headers[1].items()}


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type",
    [n for n in ROWS if n in (*map(main_type, decorated_families()), "inkling_text") and n not in PLAIN],
)
def test_without_its_row_a_family_is_refused_and_never_wrong_in_silence(model_type, monkeypatch):
    """Removing a row leaves a router that does not fit the rule; restoring it brings back what it says."""
    with monkeypatch.context() as patch:
        patch.delitem(FAMILIES, model_type)
        with pytest.raises(UnsupportedModel, match="expected the 8 experts"):
            find_layers(empty(model_type))
    if reason := FAMILIES[model_type].refuse:
        with pytest.raises(UnsupportedModel, match="not supported: " + reason[:40]):
            find_layers(empty(model_type))
    else:
        assert find_layers(empty(model_type))


TEXT_PARTS = [t for t in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t.endswith("_text")]
DECORATED = {t for family in decorated_families() for t in config_types(family)}


@pytest.mark.parametrize("model_type", sorted(t for t in set(TEXT_PARTS) & DECORATED if not family_of(t).refuse))
def test_the_text_part_alone_follows_the_rule_too(model_type):
    layers = find_layers(empty(model_type))
    assert len(layers) == 2 and all(layer.shape.num_experts == 8 for layer in layers)


@pytest.mark.parametrize("model_type", [t for n in PLAIN for t in (n, f"{n}_text") if t in CONFIG_MAPPING])
def test_what_follows_the_rule_is_refused_by_its_row_alone(model_type, monkeypatch):
    with pytest.raises(UnsupportedModel, match=r"NVFP4 and MXFP8.*several times for a token"):
        find_layers(empty(model_type))
    monkeypatch.delitem(FAMILIES, model_type.removesuffix("_text"))
    assert len(find_layers(empty(model_type))) == 3


def test_a_head_that_is_padded_in_the_file_is_counted_as_the_file_has_it(tmp_path):
    """Inkling 2 pads its output head in the file to the size of the vocabulary, and drops the rows as it loads."""
    if "inkling2" not in decorated_families() or "unpadded_vocab_size" not in tiny_config("inkling2_text").to_dict():
        pytest.skip("this transformers has no such head")
    tiny("inkling2", text_config={"vocab_size": 512, "unpadded_vocab_size": 500}).save_pretrained(tmp_path / "original")
    write_tokenizer(tmp_path / "original")
    shape = read_shape(tmp_path / "original")
    assert (shape.parameters, shape.bytes) == stored(tmp_path / "original")
    text = write_text(tmp_path / "text.txt")
    observed = locum.calibrate(
        tmp_path / "original", data=[str(text)], tokens=512, length=64, out=tmp_path / "statistics.safetensors"
    )
    assert observed.shape == shape
    locum.apply(
        tmp_path / "original",
        plan=(plan := make_plan(shape, [LayerPlan(x.name, tuple(low_rank(x)[0])) for x in shape.layers])),
        out=tmp_path / "out",
    )
    assert stored(tmp_path / "out") == (plan.size(observed.shape).parameters, plan.size(observed.shape).bytes)


def test_few_families_need_a_row():
    assert sum(family_of(main_type(family)) != Family() for family in decorated_families()) <= 9


def test_routers_that_give_probabilities_are_read_as_such(monkeypatch):
    """Softmax of the statistics' logits must give Gemma's probabilities; without the row it would soften them twice."""
    family = "gemma4"
    right = Case(family).statistics
    rule = RouterRule(shared=FAMILIES[family].router.shared)
    monkeypatch.setitem(FAMILIES, family, Family(router=rule))
    wrong = Case(family).statistics
    name = right.shape.layers[0].name
    assert torch.equal(right.layer(name)["count"], wrong.layer(name)["count"])
    model = tiny(family)
    layer, seen = find_layers(model)[0], []
    layer.router.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    with torch.no_grad():
        model(input_ids=Case(family).ids_BS)
    expected_E = seen[0].double().sum(dim=0)
    torch.testing.assert_close(right.layer(name)["softmax_sum"], expected_E, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wrong.layer(name)["softmax_sum"], expected_E, atol=1e-2)


def test_experts_of_a_newer_transformers_that_do_more_are_refused(monkeypatch):
    """A tensor or a flag that Locum does not know of would be left out of every stand-in in silence."""
    model = empty("olmoe")
    experts = find_layers(model)[1].experts
    experts.expert_scale = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts \(olmoe\).*tensor 'expert_scale'"):
        find_layers(model)
    del experts.expert_scale
    find_layers(model)
    monkeypatch.setattr(locum.models.families, "KNOWN_FLAGS", locum.models.families.KNOWN_FLAGS - {"has_gate"})
    with pytest.raises(UnsupportedModel, match="the flag 'has_gate', which this Locum does not know"):
        find_layers(model)


def test_dropping_alone_is_refused_where_only_that_is_unsafe():
    shape = Case("deepseek_v4").shape
    slots = (DROPPED, DROPPED, *[KEPT] * 6)
    with pytest.raises(PlanError, match="drops expert 0, which this model does not allow: its hash-routed layers"):
        make_plan(shape, [LayerPlan(shape.layers[0].name, slots)])
    make_plan(shape, [LayerPlan(shape.layers[0].name, (NOTHING, NOTHING, *[KEPT] * 6))])


def test_inspect_says_what_is_refused_and_what_is_left_alone(tmp_path):
    for family, said in (("deepseek_v4", "no expert of this model can be dropped"), ("dots3_note", "left alone")):
        if family in decorated_families():
            tiny(family).save_pretrained(tmp_path / family)
            assert any(said in note for note in read_shape(tmp_path / family).notes)


def test_heads_that_transformers_does_not_load_are_counted_apart(tmp_path):
    """Some checkpoints carry a multi-token-prediction head; transformers leaves it out, so Locum says so."""
    from safetensors.torch import load_file, save_file

    tiny("qwen3_next").save_pretrained(tmp_path)
    before = read_shape(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {**load_file(file), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(3, 5)}, file, {"format": "pt"}
    )
    after = read_shape(tmp_path)
    assert (after.parameters, after.bytes) == (before.parameters + 15, before.bytes + 60)
    assert (after.model.parameters, after.model.bytes) == (before.parameters, before.bytes)
    assert not before.notes and "does not load 1 tensors" in after.notes[0]


def test_experts_that_text_does_not_reach_are_left_alone():
    if "dots3_note" not in decorated_families():
        pytest.skip("this transformers has no such family")
    model = tiny("dots3_note")
    everywhere = [n for n, m in model.named_modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")]
    found = [layer.shape.name for layer in find_layers(model)]
    assert set(found) < set(everywhere) and not any("vision" in name for name in found)


def test_experts_that_share_their_number_with_others_are_never_saved_stock(monkeypatch):
    """Text and vision experts of one layer with one number of experts in the config: fewer of one need a container."""
    monkeypatch.setitem(FAMILIES, "ernie4_5_vl_moe", Family(router=FAMILIES["ernie4_5_vl_moe"].router))
    model = empty("ernie4_5_vl_moe")
    shape = shape_of(model)
    assert [layer.name.split(".")[-2] for layer in shape.layers] == ["text_moe"] * 2
    fewer = [LayerPlan(layer.name, (DROPPED, *[KEPT] * 7)) for layer in shape.layers]
    assert not make_plan(shape, fewer).is_stock(shape)
    assert make_plan(shape, [LayerPlan(layer.name, (KEPT,) * 8) for layer in shape.layers]).is_stock(shape)


@pytest.mark.parametrize("model_type", other_families())
def test_inspect_says_why_a_family_without_the_interface_is_refused(model_type):
    assert refused_with(model_type) == f"model type {model_type!r} is not supported: {family_of(model_type).refuse}"


@pytest.mark.parametrize("model_type", (*other_families(), *adapted_families()))
def test_without_its_row_a_family_without_the_interface_is_refused_too(model_type, monkeypatch):
    """A new family of this kind is never taken for one that Locum can observe."""
    model = empty(model_type) if model_type in adapted_families() else empty_other(model_type)
    monkeypatch.delitem(FAMILIES, model_type.removesuffix("_text"))
    with pytest.raises(UnsupportedModel, match=r"not behind transformers' experts interface|has no mixture-of-experts"):
        find_layers(model)


@pytest.mark.parametrize("family", adapted_families())
def test_experts_put_behind_the_interface_are_otherwise_as_they_were(family):
    """Only this model's experts change, once, and in nothing but what the decorator gives."""
    plain, model = tiny(family), tiny(family)
    ids_BS = Case(family).ids_BS
    with torch.no_grad():
        expected = plain(input_ids=ids_BS).logits
    layers = find_layers(model)
    classes = [type(layer.experts) for layer in layers]
    assert [type(layer.experts) for layer in find_layers(model)] == classes  # and no decorator on a decorator
    for layer, bare in zip(layers, (plain.get_submodule(x.shape.name) for x in layers), strict=True):
        assert issubclass(type(layer.experts), type(bare)) and not hasattr(bare, "has_gate")
        assert type(layer.experts).forward.__wrapped__ is type(bare).forward
        assert layer.experts.state_dict().keys() == bare.state_dict().keys()
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        assert {layer.experts.config._experts_implementation for layer in layers} == {name}
        with torch.no_grad():
            near(model(input_ids=ids_BS).logits, expected, 2e-5)
    with pytest.raises(ValueError, match="does not support setting experts implementation"):
        plain.set_experts_implementation("grouped_mm")


def test_a_whole_omni_model_says_what_to_do_instead():
    assert "thinker" in FAMILIES["qwen3_omni_moe"].refuse


def test_an_adapter_without_a_base_at_full_rank_is_its_expert_biases_included():
    """gpt_oss has biases in its experts: at full rank, an SVD start must reproduce the model."""
    case = Case("gpt_oss")
    rank = min(case.shape.layers[0].hidden_size, case.shape.layers[0].expert_width)
    plan = case.plan(lambda shape: ([stand_in(rank=rank, start="svd")] * shape.num_experts, []))
    near(case.logits_of(case.applied(plan)), case.logits, 1e-4)


@pytest.mark.parametrize("family", [f for f in ("muse_spark", "olmoe", "gpt_oss", "step3p7") if f in all_families()])
def test_recovery_opens_and_closes_a_layer_and_nothing_changes(family):
    """Also where a norm comes after the expert, stock and compressed."""
    case = Case(family)
    for model, plan in ((case.model(), None), (case.applied(case.plan(low_rank)), case.plan(low_rank))):
        before, expected = {n: t.clone() for n, t in model.state_dict().items()}, case.logits_of(model)
        for layer in find_layers(model):
            opened = open_layer(model, layer, plan and plan.layer(layer.shape.name), 2, True, 0)
            near(case.logits_of(model), expected, 2e-5)
            close_layer(model, opened)
            opened = open_rows(
                model, next(x for x in find_layers(model) if x.shape.name == opened.name), opened.plan, {1, 2}
            )
            near(case.logits_of(model), expected, 2e-5)
            close_layer(model, opened)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_is_current():
    assert matrix.PAGE.read_text() == matrix.page(matrix.all_results()), "run `make families`"


@pytest.mark.parametrize("version, families, whole", [("5.24.0", 68, 63), ("5.23.0", 65, 61), ("5.17.0", 55, 51)])
def test_the_results_are_whole(version, families, whole):
    results = json.loads((matrix.RESULTS / f"families-{version}.json").read_text())
    found = [matrix.summary(row["checks"]) for row in results["families"].values()]
    assert len(found) == families and found.count("all") >= whole
    assert all(list(row["checks"]) == list(CHECKS) for row in results["families"].values())
    assert not any(said.startswith("fails") for said in found)
    assert results["minutes"] < 12


def test_changes_are_told():
    one = {"families": {"a": {"checks": {"x": "passed"}}, "b": {"checks": {"x": "passed"}}}}
    two = {
        "families": {
            "a": {"checks": {"x": "failed: no"}},
            "b": {"checks": {"x": "passed"}},
            "c": {"checks": {"x": "passed"}},
        }
    }
    assert matrix.changes(one, two) == ["a, x: passed -> failed: no", "c, x: not there -> passed"]
