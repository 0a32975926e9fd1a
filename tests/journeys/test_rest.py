"""`compress --rest`: what is outside of the experts in few bits too, in the size that --fit asks for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.rest import pack_rest, saved_bytes
from locum.checkpoints.skeleton import open_source, read_shape
from locum.errors import OptionError, PlanError
from locum.formats.schemes import scheme_of
from locum.plans.bits import FewBits
from locum.plans.plan import make_plan
from locum.stages import compression
from locum.verification.folder import Folder, check_size
from making.checkpoints import tree, write_checkpoint
from making.quantised import write_quantised
from making.tiny_models import tiny_ids

pytestmark = pytest.mark.journeys
WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
FEW = {"bits": "4", "quantiser": "nearest"}
SHORT = {"tokens": 512, "length": 32}
LINEAR = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Qwen3-MoE whose rows are whole groups. Tests only read it."""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "original", "qwen3_moe", **WIDE)


def size_of(folder):
    return sum(e["data_offsets"][1] - e["data_offsets"][0] for e in read_headers(folder).values())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("scheme", ["4", "8", "fp8"])
def test_it_saves_to_the_byte_what_the_original_says_and_all_else_keeps_its_bytes(family, scheme, tmp_path):
    model = write_checkpoint(tmp_path / "original", family, num_hidden_layers=1, **WIDE)
    shape, chosen = read_shape(model), scheme_of(scheme, 32)
    plan = make_plan(shape, FewBits.of("4", 32, "nearest").applied([], shape))
    made = locum.apply(model, plan=plan, out=tmp_path / "made")
    pack_rest(made, chosen, tmp_path / "out")
    saved = saved_bytes(open_source(model), chosen)
    assert saved > 0 and size_of(tmp_path / "out") == size_of(made) - saved == plan.size(shape).bytes - saved
    assert check_size(Folder(tmp_path / "out", model, "cpu")).endswith("as the plan promised")
    gone = {name.removesuffix(".weight_scale") for name in read_headers(tmp_path / "out") if name.endswith("_scale")}
    assert gone and {f"{name}.weight" for name in gone} <= read_headers(made).keys()
    assert not any(word in f"{name}." for name in gone for word in (".experts.", "gate.", "norm", "embed", "router"))
    one, two = load_model(made).state_dict(), load_model(tmp_path / "out").state_dict()
    assert one.keys() == two.keys()
    for name in one:
        is_same = torch.equal(one[name], two[name])
        assert is_same == (name.removesuffix(".weight") not in gone), name
        assert (one[name].float() - two[name].float()).norm() <= 0.15 * one[name].float().norm()


def test_fit_is_the_size_of_the_whole_and_the_largest_plan_that_meets_it(wide, words, tmp_path):
    shape, saved = read_shape(wide), saved_bytes(open_source(wide), scheme_of("4", 32))
    limit = shape.bytes // 4
    asked = {"data": str(words), "method": "prune", "statistics": tmp_path / "stats", **FEW, **SHORT}
    made = locum.compress(wide, fit=str(limit), rest="4", out=tmp_path / "out", **asked)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "stats"}
    plan = locum.load_plan(made / "plan.json")
    assert size_of(made) == plan.size(shape).bytes - saved <= limit < plan.size(shape).bytes
    one = max(shape.bytes_of_expert(layer) for layer in shape.layers) // 4
    assert size_of(made) > limit - 2 * one
    assert locum.compress(wide, fit=str(limit + saved), out=tmp_path / "plain", **asked) and (
        locum.load_plan(tmp_path / "plain" / "plan.json").id == plan.id
    )
    assert f"{size_of(made):,} |" in (made / "README.md").read_text()
    live = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        assert torch.equal(live(tiny_ids()).logits, load_model(made)(tiny_ids()).logits)
    groups = json.loads((made / "config.json").read_text())["quantization_config"]["rest"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["lm_head", *sorted(LINEAR)]]
    with pytest.raises(OptionError, match="what is not a routed expert has"):
        locum.compress(wide, fit=str(others(shape) - saved - 1), rest="4", out=tmp_path / "no", **asked)
    with pytest.raises(PlanError, match=f"to {smallest(plan, shape, saved):,} bytes"):
        locum.compress(wide, fit=str(smallest(plan, shape, saved) - 1), rest="4", out=tmp_path / "no", **asked)


def smallest(plan, shape, saved):
    """Bytes of the result that keeps top-k experts of each layer in four bits."""
    kept = sum(layer.bytes(of, shape) * of.top_k // len(layer.survivors) for layer, of in both(plan, shape))
    routers = sum(of.router_bytes * of.top_k for of in shape.layers)
    return others(shape) - sum(of.router_bytes * of.num_experts for of in shape.layers) + routers + kept - saved


def others(shape):
    return shape.bytes - shape.bytes_of_experts


def both(plan, shape):
    return zip(plan.layers, shape.layers, strict=True)


def test_a_training_is_not_done_again_when_packing_was_interrupted(wide, words, tmp_path, monkeypatch):
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "rest": "4", "recover": "lora", "recover_rank": 2}
    asked |= {"recover_steps": 1, "recover_batch_size": 1, "recover_length": 32, **FEW, **SHORT}
    whole = locum.compress(wide, out=tmp_path / "whole", **asked)
    trained = []
    monkeypatch.setattr(compression, "recover_stage", lambda *a, **k: trained.append(1) or recover(*a, **k))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compression, "pack_rest", interrupted)
        locum.compress(wide, out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    made = locum.compress(wide, out=tmp_path / "out", **asked)
    assert trained == [1] and {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert tree(made)["model.safetensors"] == tree(whole)["model.safetensors"]
    assert (made / "recovery.jsonl").is_file()


def recover(*given, **named):
    return locum.recover(*given, **named)


def interrupted(*given):
    raise KeyboardInterrupt


def test_what_cannot_be_packed_is_refused_before_anything_is_written(wide, words, tmp_path):
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "out": tmp_path / "out", **SHORT}
    with pytest.raises(OptionError, match="unknown number format of compressed-tensors '3'"):
        locum.compress(wide, rest="3", **asked)
    with pytest.raises(OptionError, match="leave --rest out, and put what they leave into few bits afterwards"):
        locum.compress(wide, rest="4", rounds=2, **asked)
    with pytest.raises(OptionError, match="experts that are numbers beside layers in 4 bits"):
        locum.compress(wide, rest="4", **asked)
    narrow = write_checkpoint(tmp_path / "narrow", "qwen3_moe", num_hidden_layers=1, hidden_size=16, head_dim=4)
    with pytest.raises(OptionError, match="rows are no whole groups of 64"):
        locum.compress(narrow, rest="4", **{**asked, "group": 64})
    packed, _ = write_quantised(tmp_path, "int-packed")
    with pytest.raises(OptionError, match="is quantised already"):
        locum.compress(packed, rest="4", **asked)
    assert not (tmp_path / "out").exists()
    stock = locum.compress(wide, rest="fp8", **asked)
    with torch.no_grad():
        live = AutoModelForCausalLM.from_pretrained(stock)
        assert torch.equal(live(tiny_ids()).logits, load_model(stock)(tiny_ids()).logits)
