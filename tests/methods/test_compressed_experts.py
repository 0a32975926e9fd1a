"""Compressed Experts on whole models: what they compute, cost, and save, in this process and in a fresh one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import locum
from families.tiny_families import tiny
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.skeleton import read_shape
from locum.containers.layout import active_parameters
from locum.errors import CheckpointError, OptionError, PlanError
from locum.experts.policies.main_with_vectors import VECTORS, MainWithVectors
from locum.models.families import canonical_activation, find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Plan, make_plan, stand_in
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint
from making.oracles import slow_routed
from making.policies import TOP_4, drawn, logits, near, policy_plan
from making.tiny_models import tiny_ids, tiny_model

SRC = Path(locum.__file__).parents[1]
FAMILIES = ["olmoe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"]
FAMILIES += ["muse_spark"] if "muse_spark" in CONFIG_MAPPING else []  # the installed transformers may lack it


def model_of(family):
    if family in ("nemotron_h", "muse_spark"):  # no gate; a norm after each expert
        return tiny(family)
    return tiny_model(family, **({} if family == "deepseek_v3" else TOP_4))


# --- what it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vectors", VECTORS)
def test_every_layer_computes_the_formulas_of_the_paper(family, vectors):
    """On what the family's own router hands over, from the family's own weights."""
    original = model_of(family)
    plan = policy_plan(original, lambda layer: MainWithVectors(layer.top_k // 2, vectors))
    model = drawn(apply_plan(copy.deepcopy(original), plan))
    seen = {}
    for layer in find_layers(model):

        def see(module, given, output, name=layer.shape.name):
            seen[name] = (*given, output)

        layer.experts.register_forward_hook(see)
    logits(model, tiny_ids(1, 7, vocab=120))
    compressed = {layer.shape.name: layer.experts for layer in find_layers(model)}
    for layer in find_layers(original):
        x, index, gates, output = seen[layer.shape.name]
        offsets = getattr(compressed[layer.shape.name], "offsets_NV", None)

        def parts(e, experts=layer.experts):
            w = read_expert(experts, e)
            zeros = w.down_DF.new_zeros(w.down_DF.shape[0])
            b1, b2 = (w.gate_up_bias_G, w.down_bias_D) if w.up_bias_F is not None else (0.0, zeros)
            return {"W1": w.gate_up_GD, "b1": b1, "W2": w.down_DF, "b2": b2, "c": zeros}

        norm = getattr(layer.experts, "post_expert_norm", None) or (lambda out_D: out_D)
        policy, gate = MainWithVectors(layer.shape.top_k // 2, vectors), canonical_activation(layer.experts)
        with torch.no_grad():
            expected = slow_routed(parts, gate, policy, None if offsets is None else 1 + offsets, x, index, gates, norm)
        near(output, expected)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("vectors", VECTORS)
def test_untrained_it_is_the_stock_model_with_fewer_experts(family, vectors):
    """As the stock model weighs them: with weights that sum to one over the selected, main ones are renormalised."""
    renormalised = family != "olmoe"
    original = tiny_model(family, **TOP_4)
    assert shape_of(original).layers[0].renormalised is renormalised
    half = tiny_model(family, num_experts_per_tok=2)
    model = apply_plan(
        copy.deepcopy(original), policy_plan(original, lambda _: MainWithVectors(2, vectors, renormalised))
    )
    near(logits(model), logits(half))
    assert float((logits(model) - logits(original)).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_experts_main_it_is_the_base(family):
    original = model_of(family)
    model = drawn(
        apply_plan(copy.deepcopy(original), policy_plan(original, lambda layer: MainWithVectors(layer.top_k)))
    )
    near(logits(model), logits(original))


def mixture(shape):
    """Pruning, a shared base with an adapter, low rank, nothing and kept experts under one policy."""
    slots = (DROPPED, stand_in(base=0, rank=2, start="svd"), stand_in(base=0), NOTHING)
    slots = (*slots, stand_in(rank=3, start="svd"), KEPT, KEPT, KEPT)
    base = Base((1, 2), (0.5, 0.5))
    return [LayerPlan(x.name, slots, (base,), MainWithVectors(2)) for x in shape.layers]


def test_generation_with_a_cache_equals_recomputation():
    original = tiny_model("olmoe", **TOP_4)
    model = drawn(apply_plan(original, make_plan(shape_of(original), mixture(shape_of(original)))))
    prompt = tiny_ids(2, 9)
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(prompt), "eos_token_id": None}
    written, slow = (model.generate(prompt, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(written, slow) and written.shape[1] == 17


# --- what it costs ----------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_tensors():
    original = tiny_model("olmoe", **TOP_4)
    shape, expert = shape_of(original), 3 * 32 * 16
    rest = shape.parameters - shape.expert_parameters
    assert active_parameters(shape) == rest + 2 * 4 * expert
    widths = {"projections": (8, 80, 2), "hidden": (8, 32, 2), "static": (1, 80, 1), "none": (0, 0, 0)}
    for vectors, (rows, width, used) in widths.items():
        plan = policy_plan(original, lambda _, vectors=vectors: MainWithVectors(2, vectors))
        model = apply_plan(copy.deepcopy(original), plan)
        assert shape_of(model).parameters == plan.size(shape).parameters == shape.parameters + 2 * rows * width
        assert active_parameters(shape, plan) == rest + 2 * (2 * expert + used * width)
        assert plan.removed(shape) == pytest.approx(-2 * rows * width / shape.expert_parameters)
        assert not plan.is_stock(shape) and not plan.layers[0].is_identity and plan.keeps_experts


def test_active_parameters_of_a_mixture_are_those_of_its_largest_experts():
    shape = shape_of(tiny_model("olmoe", **TOP_4))
    plan = make_plan(shape, mixture(shape))
    rest = plan.size(shape).parameters - plan.size(shape).expert_parameters
    with_adapter = 3 * 32 * 16 + 3 * 2 * (32 + 16)  # a base counts for each expert that computes with it
    assert active_parameters(shape, plan) == rest + 2 * (with_adapter + 3 * 32 * 16 + 2 * 80)


# --- through files ----------------------------------------------------------------------------------------------

CASES = {family: family for family in ("olmoe", "deepseek_v3", "gpt_oss")} | {"mixture": "olmoe", "untrained": "olmoe"}
CHILD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import locum
torch.set_num_threads(1)
root = sys.argv[1]
ids, results = torch.load(f"{root}/ids.pt"), {}
for name in json.loads(sys.argv[2]):
    for way, options in {"plain": {}, "auto": {"device_map": "auto"}, "low": {"low_cpu_mem_usage": True}}.items():
        model, info = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", output_loading_info=True, **options)
        offsets = [m.offsets_NV.detach().cpu() for m in model.modules() if getattr(m, "offsets_NV", None) is not None]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            results[name, way] = model.eval()(ids.to(model.device)).logits.cpu(), offsets, [k for k, v in info.items() if v]
torch.save(results, f"{root}/results.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models as they were saved, and what a fresh process that imports Locum makes of them."""
    root = tmp_path_factory.mktemp("saved")
    torch.save(tiny_ids(vocab=120), root / "ids.pt")
    models = {}
    for name, family in CASES.items():
        original = model_of(family)
        shape = shape_of(original)
        plan = make_plan(shape, mixture(shape)) if name == "mixture" else policy_plan(original)
        model = apply_plan(original, plan)
        models[name] = model if name == "untrained" else drawn(model), plan, shape
        model.save_pretrained(root / name)
    environment = {"PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-c", CHILD, str(root), json.dumps(list(CASES))]
    subprocess.run(child, check=True, timeout=300, env=environment | {"HOME": str(root)})
    return root, models, torch.load(root / "results.pt")


@pytest.mark.parametrize("way", ["plain", "auto", "low"])
@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_computes_the_same_to_the_bit(saved, case, way):
    root, models, results = saved
    model, plan, shape = models[case]
    found, offsets, faults = results[case, way]
    assert faults == [] and len(offsets) == len(plan.layers)
    model = copy.deepcopy(model).eval()
    assert torch.equal(found, logits(model))
    for layer, loaded in zip(find_layers(model), offsets, strict=True):
        assert torch.equal(layer.experts.offsets_NV, loaded)
        assert case != "untrained" or bool((1 + loaded == 1).all())  # every vector starts at one
    size = sum(e["data_offsets"][1] - e["data_offsets"][0] for e in read_headers(root / case).values())
    assert size == plan.size(shape).bytes


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_vectors_that_a_file_lacks_are_an_error(saved, tmp_path, options):
    """Compressed Experts' released code leaves them uninitialised: NaN or 1e38 under device_map="auto"."""
    folder = tmp_path / "lacking"
    load_model(saved[0] / "olmoe").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("offsets_NV"))
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing.*offsets_NV"):
        AutoModelForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(CheckpointError, match=r"missing.*offsets_NV"):
        load_model(folder)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"main": 5}, "main 5; allowed: 1 to 4"),
        ({"main": 0}, "main 0; allowed: 1"),
        ({"vectors": "all"}, "unknown kind of vectors"),
        ({"main": "2"}, "main '2'"),
        ({"other": 1}, "cannot be read"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_when_loading(saved, tmp_path, entry, words):
    folder = tmp_path / "changed"
    load_model(saved[0] / "olmoe").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    next(iter(config["quantization_config"]["layers"].values()))["policy"] |= entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


# --- the stages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def top_4(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("top-4") / "original", **TOP_4)


def test_a_checkpoint_is_enough_to_compress(top_4, tmp_path):
    made = command("compress", top_4, "--method", "compressed-experts", "--vectors", "hidden", "--out", tmp_path / "ce")
    assert made.exit_code == 0, made.stderr
    plan = Plan.loads((tmp_path / "ce" / "plan.json").read_text())
    assert {layer.routing for layer in plan.layers} == {MainWithVectors(2, "hidden")} and plan.keeps_experts
    said = json.loads(command("inspect", tmp_path / "ce", "--json").stdout)
    before = json.loads(command("inspect", top_4, "--json").stdout)
    assert said["active_parameters"] == active_parameters(read_shape(top_4), plan) < before["active_parameters"]
    assert said["active_bytes"] == 4 * said["active_parameters"] and said["parameters"] > before["parameters"]
    assert said["layers"][0]["routing"] == "2 main, vectors hidden" and before["layers"][0]["routing"] is None
    assert "fewer parameters active for a token" in (tmp_path / "ce" / "README.md").read_text()
    summary = json.loads(command("plan", top_4, "--method", "compressed-experts", "--main", 1, "--json").stdout)
    assert summary["active_parameters"][0] == before["active_parameters"] > summary["active_parameters"][1]
    assert command("plan", top_4, "--method", "compressed-experts").stdout.count("active parameters") == 1


def test_a_policy_goes_onto_another_plan(checkpoint, statistics_file, plan_file, tmp_path):
    joined = locum.plan(statistics_file, method="compressed-experts", main=1, onto=plan_file, out=tmp_path / "p.json")
    base = Plan.loads(plan_file.read_text())
    for ours, theirs in zip(joined.layers, base.layers, strict=True):
        assert ours.routing == MainWithVectors(1) and (ours.slots, ours.bases) == (theirs.slots, theirs.bases)
    assert joined.method == "lightmoe + compressed-experts"
    assert joined.provenance["onto"]["plan"] == base.id
    assert joined.provenance["statistics_file"] == base.provenance["statistics_file"]
    out = locum.apply(checkpoint, plan=tmp_path / "p.json", out=tmp_path / "both")
    assert {layer.experts.layout.routing for layer in find_layers(load_model(out))} == {MainWithVectors(1)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--remove 0.5", "saves active parameters, not stored ones"),
        ("--fit 1GiB", "saves active parameters, not stored ones"),
        ("--main 5", "allowed: 1 to 4"),
        ("--vectors gate", "--vectors"),
        ("--score reap", "no option '--score'"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_runs(top_4, tmp_path, line, words):
    for verb in ("plan", "compress"):
        made = command(verb, top_4, "--method", "compressed-experts", *line.split(), "--out", tmp_path / "out")
        assert made.exit_code == 2 and words in made.stderr and not (tmp_path / "out").exists()


def test_a_folder_is_no_statistics_for_methods_that_need_them(top_4, plan_file, statistics_file):
    with pytest.raises(OptionError, match="locum calibrate"):
        locum.plan(top_4, method="prune", remove=0.25)
    with pytest.raises(OptionError, match="routing policy"):
        locum.plan(statistics_file, method="prune", remove=0.25, onto=plan_file)


def test_a_router_that_selects_one_expert_leaves_nothing_to_save(tmp_path):
    one = write_checkpoint(tmp_path / "one", num_experts_per_tok=1)
    with pytest.raises(PlanError, match="selects one expert"):
        locum.plan(one, method="compressed-experts")


def test_half_of_an_odd_number_rounds_up(tmp_path):
    odd = write_checkpoint(tmp_path / "odd", num_experts_per_tok=3)
    assert {x.routing.main for x in locum.plan(odd, method="compressed-experts").layers} == {2}
