"""Containers in quantised checkpoints: what is kept stays in its format, and all else is what it is in an unquantised one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.load import load_model, open_model
from locum.checkpoints.numbers_quantizer import is_possible
from locum.checkpoints.placing import LocumConfig
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.streamed import stream_model
from locum.containers.container import StandInExperts
from locum.errors import CheckpointError
from locum.models.layer_major import passes
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, Plan, make_plan, stand_in
from locum.shapes import ModelShape
from making.broken import change_weights
from making.checkpoints import locum as command
from making.quantised import KINDS, write_quantised
from making.tiny_models import tiny_ids

KEEP = (0, 2, 4, 5)
LIGHT = (*[KEPT, stand_in(0, 2, "svd")] * 2, KEPT, KEPT, *[stand_in(None, 3, "svd")] * 2)
BASES = (Base((1, 3), (0.5, 0.5)),)
RANKS = tuple(stand_in(None, 2 + e % 2, "svd") for e in range(8))
FEWER = (DROPPED, *[KEPT] * 3, DROPPED, *[KEPT] * 3)


def light(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(x.name, LIGHT, BASES) for x in shape.layers])


def decomposed(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(x.name, RANKS) for x in shape.layers])


def in_one_layer(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(shape.layers[1].name, LIGHT, BASES)])


def uneven(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(shape.layers[1].name, FEWER)])


PLANS = {plan.__name__: plan for plan in (light, decomposed, in_one_layer, uneven)}


ALWAYS = ("fp8-block", "int-packed")  # the others are among the journeys


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=() if kind in ALWAYS else pytest.mark.journeys) for kind in KINDS]
)
def both(request, tmp_path_factory):
    """A quantised checkpoint and its numbers. Tests only read them."""
    return write_quantised(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_quantised(tmp_path_factory.mktemp("fp8"), "fp8-block")[0]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tiny_ids()).logits


@pytest.mark.parametrize("plan", PLANS)
def test_a_container_computes_what_it_computes_in_an_unquantised_checkpoint(plan, both, tmp_path):
    quantised, plain = both
    shape = read_shape(quantised)
    decided = PLANS[plan](shape)
    out, expected = (locum.apply(x, plan=decided, out=tmp_path / x.name) for x in (quantised, plain))
    after = tensors_in(out)
    assert sum(t.nbytes for t in after.values()) == decided.size(shape).bytes == read_shape(out).bytes
    assert read_shape(out).parameters == read_shape(expected).parameters == decided.size(shape).parameters
    said = locum.inspect(out)
    assert said["compressed"] and 0 < said["active_bytes"] < said["bytes"]
    computed = logits(load_model(expected))
    assert torch.equal(logits(load_model(out)), computed)
    model = stream_model(out)
    (streamed,) = passes(model, [lambda: logits(model)])  # in a thread, where gradients have a mode of their own
    assert torch.equal(streamed, computed)
    if is_possible():
        model = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(logits(model), computed)
        assert model.generate(tiny_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_kept_experts_keep_their_bytes_and_scales_under_the_numbers_of_their_rows(both, tmp_path):
    quantised, _ = both
    shape = read_shape(quantised)
    before, after = tensors_in(quantised), tensors_in(locum.apply(quantised, plan=light(shape), out=tmp_path / "out"))
    for layer in shape.layers:
        block = layer.name.removesuffix("experts")
        checked = 0
        for name in (n for n in before if n.startswith(f"{block}experts.")):
            if f"{block}experts.0." in name:
                numbered = [(name.replace(".experts.0.", f".experts.{n}."), n) for n in range(8)]
                for new, old in enumerate(KEEP):
                    assert raw(after[numbered[new][0]]) == raw(before[numbered[old][0]])
                    checked += 1
                assert not any(path in after for path, n in numbered if n >= len(KEEP))
            elif before[name].shape[:1] == (8,):
                assert raw(after[name]) == raw(before[name][list(KEEP)])
                checked += 1
        assert checked > 3
        made = [t.dtype for n, t in after.items() if n.startswith((f"{layer.name}.bases.", f"{layer.name}.adapters."))]
        assert len(made) > 5 and {*made} == {torch.bfloat16}
        assert len(after[f"{layer.name}.bases.down_NDF"]) == 1
    rest = [name for name in before if ".experts." not in name]
    assert len(rest) > 10 and all(raw(before[name]) == raw(after[name]) for name in rest)


def test_config_json_says_both_and_numbers_experts_by_their_rows(fp8, tmp_path):
    model = shutil.copytree(fp8, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    path = "model.layers.1.mlp.experts."
    config["quantization_config"]["modules_to_not_convert"] = [f"{path}{e}.up_proj" for e in (1, 4)]
    (model / "config.json").write_text(json.dumps(config))
    out = locum.apply(model, plan=light(read_shape(model)), out=tmp_path / "out")
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "locum" and len(said["layers"]) == 2
    assert said["rest"] == config["quantization_config"] | {"modules_to_not_convert": [f"{path}2.up_proj"]}


def test_what_was_loaded_as_numbers_is_an_ordinary_model(fp8, tmp_path):
    out = locum.apply(fp8, plan=light(read_shape(fp8)), out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(model, "hf_quantizer") and isinstance(model.config.quantization_config, LocumConfig)
    model.save_pretrained(tmp_path / "saved")
    assert "rest" not in json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    model.float()
    model(tiny_ids(), labels=tiny_ids()).loss.backward()


def uneven_again(shape: ModelShape) -> Plan:
    """Two fewer in the layer that is whole, so that they are equal."""
    return make_plan(shape, [LayerPlan(shape.layers[0].name, FEWER)])


def fewer_and_light(shape: ModelShape) -> Plan:
    """Of six experts of a layer two less, and stand-ins."""
    slots = (KEPT, DROPPED, stand_in(0, 2, "svd"), KEPT, DROPPED, stand_in(0, 2, "svd"))
    return make_plan(shape, [LayerPlan(shape.layers[1].name, slots, (Base((2, 5), (0.5, 0.5)),))])


def fewer_still(shape: ModelShape) -> Plan:
    slots = (KEPT, DROPPED, KEPT, KEPT, DROPPED, KEPT)
    return make_plan(shape, [LayerPlan(shape.layers[1].name, slots)])


def as_it_is(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(x.name, (KEPT,) * x.num_experts) for x in shape.layers])


@pytest.mark.parametrize("both", ["fp8-block", pytest.param("mxfp4", marks=pytest.mark.journeys)], indirect=True)
@pytest.mark.parametrize("again", [uneven_again, fewer_and_light, fewer_still, as_it_is])
def test_what_was_pruned_to_unequal_numbers_is_opened_and_cut_again(again, both, tmp_path):
    pruned = [locum.apply(x, plan=uneven(read_shape(x)), out=tmp_path / f"{x.name} 1") for x in both]
    shapes = [read_shape(folder) for folder in pruned]
    assert torch.equal(logits(open_model(pruned[0])), logits(open_model(pruned[1])))
    assert shapes[0].layers[0].expert_bytes == shapes[0].layers[1].expert_bytes > 0
    decided = again(shapes[0])
    out, expected = (locum.apply(x, plan=decided, out=tmp_path / f"{x.name} 2") for x in pruned)
    after, before = tensors_in(out), tensors_in(pruned[0])
    assert sum(t.nbytes for t in after.values()) == decided.size(shapes[0]).bytes == read_shape(out).bytes
    assert torch.equal(logits(load_model(out)), logits(load_model(expected)))
    if again is as_it_is:
        assert after.keys() == before.keys() and all(raw(after[name]) == raw(before[name]) for name in before)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert ("rest" in config) == (again is not uneven_again)


@pytest.mark.parametrize(
    "ending", ["bases.down_NDF", "experts.3.up_proj.weight", "experts.2.down_proj.weight_scale_inv"]
)
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_damaged_containers_are_refused_by_locum_and_by_transformers(ending, how, fp8, tmp_path):
    out = locum.apply(fp8, plan=light(read_shape(fp8)), out=tmp_path / "out")
    name = next(name for name in sorted(tensors_in(out)) if name.endswith(ending))

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        whole = tensors.pop(name)
        if how == "cut":
            tensors[name] = whole[:, :-1].contiguous()

    change_weights(out, damage)
    said = command("inspect", out)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1, said.stderr
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError):
            load(out)


def test_on_a_gpu_the_checkpoints_own_quantizer_has_what_is_in_no_container(fp8, tmp_path, monkeypatch):
    """As far as can be seen without one: what is loaded, not what it computes."""
    finegrained = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    monkeypatch.setattr(finegrained.FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr("locum.checkpoints.quantizer.is_on_accelerator", lambda device_map: True)
    out = locum.apply(fp8, plan=in_one_layer(read_shape(fp8)), out=tmp_path / "out")
    model, files = AutoModelForCausalLM.from_pretrained(out), tensors_in(out)
    held = model.state_dict()
    for name in (n for n in files if ".self_attn.o_proj." in n or ".shared_experts." in n):
        assert raw(held[name]) == raw(files[name])
    stock = model.model.layers[0].mlp.experts
    assert stock.down_proj.dtype == torch.float8_e4m3fn and stock.down_proj_scale_inv.dtype == torch.float32
    container = model.model.layers[1].mlp.experts
    expected = load_model(out).model.layers[1].mlp.experts
    assert isinstance(container, StandInExperts)
    assert all(torch.equal(a, b) for a, b in zip(container.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match="not serializable"):  # it would be two things at once
        model.save_pretrained(tmp_path / "saved")


def test_numbers_are_read_in_the_precision_that_is_asked_for(both):
    quantised, plain = both
    wide, narrow = load_model(quantised, dtype=torch.float32).state_dict(), load_model(plain).state_dict()
    assert {t.dtype for t in wide.values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.equal(wide[name].to(tensor.dtype), tensor) for name, tensor in narrow.items())
    exact = quantised.parent.name.startswith("mxfp4")  # few bits and powers of two
    assert exact == all(torch.equal(wide[name], tensor.float()) for name, tensor in narrow.items())


@pytest.mark.parametrize("rest", [{}, {"quant_method": "locum"}, [1], {"quant_method": "awq"}])
def test_a_senseless_rest_is_refused(rest, fp8, tmp_path):
    out = locum.apply(fp8, plan=light(read_shape(fp8)), out=tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["rest"] = rest
    (out / "config.json").write_text(json.dumps(config))
    said = command("inspect", out)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1


@pytest.mark.journeys
@pytest.mark.parametrize("kind", ["fp8-block", "mxfp4"])
def test_a_fresh_process_generates(kind, tmp_path):
    model, _ = write_quantised(tmp_path, kind)
    out = locum.apply(model, plan=light(read_shape(model)), out=tmp_path / "out")
    code = (
        "import sys, torch, locum; from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1]); print(m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert json.loads(said.stdout) == model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).tolist()
