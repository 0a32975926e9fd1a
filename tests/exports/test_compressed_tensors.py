"""`locum export --to compressed-tensors`: what compressed-tensors itself reads of it, and what transformers computes.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints import compression
from locum.checkpoints.compression import Compression
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.skeleton import open_source, read_shape
from locum.errors import CheckpointError, UnsupportedModel
from locum.exports.compressed_tensors import CompressedTensors
from locum.formats.format import declared_formats
from locum.formats.schemes import SCHEMES, quantization_config, scheme_of
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint
from making.quantised import write_quantised
from making.tiny_models import tiny_ids

compressors = pytest.importorskip("compressed_tensors.compressors")


def bfloat16(folder: Path) -> Path:
    """The same checkpoint in bfloat16, in place."""
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A Qwen3-MoE in bfloat16 with experts of 96 units. Tests only read it."""
    changes = {"num_hidden_layers": 1, "moe_intermediate_size": 96}
    return bfloat16(write_checkpoint(tmp_path_factory.mktemp("narrow") / "original", "qwen3_moe", **changes))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Matrices are read in several pieces, the last one shorter."""
    monkeypatch.setattr(compression, "NUMBERS", 7 * 96)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every packed weight as compressed-tensors reads it, and every other tensor."""
    from compressed_tensors.quantization import QuantizationScheme

    said, found, parts = config_of(folder), {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        parts.setdefault(module, {})[leaf] = tensor
    experts, *rest = said["config_groups"].values()
    for module, tensors in parts.items():
        if "weight_scale" not in tensors:
            found |= {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
            continue
        group = experts if ".experts." in module else rest[0]
        compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
        found[f"{module}.weight"] = compressor.decompress(tensors, QuantizationScheme(**group))["weight"]
    return found


@pytest.mark.parametrize("bits", SCHEMES)
def test_numbers_are_those_that_compressed_tensors_reads_and_as_near_as_the_format_allows(bits, narrow, tmp_path):
    said = locum.export(narrow, to="compressed-tensors", bits=bits, out=tmp_path / "out")
    before, found = load_file(narrow / "model.safetensors"), decompressed(tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert found.keys() == before.keys() == source.headers.keys()
    experts = [name for name in before if ".experts." in name]
    for name in before.keys() - set(experts):
        assert torch.equal(found[name], before[name])
    for name in experts:
        off = (found[name].float() - before[name].float()).norm() / before[name].float().norm()
        assert off < {"8": 0.008, "fp8": 0.04}.get(bits, 0.13)
    live = load_model(tmp_path / "out").state_dict()
    mine, theirs = (
        live["model.layers.0.mlp.experts.down_proj"][3],
        found["model.layers.0.mlp.experts.3.down_proj.weight"],
    )
    apart = 0.01 if bits == "nvfp4" else 0  # compressed-tensors multiplies scales in bfloat16
    assert torch.allclose(mine.float(), theirs.float(), rtol=apart, atol=0)
    rows, numbers = sum(len(before[n]) for n in experts), sum(before[n].numel() for n in experts)
    shapes = 16 * len(experts) if bits in ("4", "8") else 0
    promised = {
        "4": numbers // 2 + numbers // 16,
        "8": numbers + numbers // 16,
        "fp8": numbers + 2 * rows,
        "mxfp4": numbers // 2 + numbers // 32,
        "nvfp4": numbers // 2 + numbers // 16 + 4 * len(experts),
    }
    rest = sum(tensor.nbytes for name, tensor in before.items() if name not in experts)
    assert said["bytes"][1] == promised[bits] + shapes + rest == read_shape(tmp_path / "out").bytes


@pytest.mark.parametrize(("bits", "rest"), [("4", "8"), ("fp8", "4"), ("mxfp4", "fp8")])
def test_transformers_computes_what_locum_computes_and_nothing_is_left_out(bits, rest, narrow, tmp_path):
    shape = read_shape(narrow)
    plan = make_plan(shape, [LayerPlan(x.name, (DROPPED, *[KEPT] * 6, DROPPED)) for x in shape.layers])
    pruned = locum.apply(narrow, plan=plan, out=tmp_path / "pruned")
    locum.export(pruned, to="compressed-tensors", bits=bits, rest=rest, out=tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(model), logits(load_model(tmp_path / "out")))
    packed = {name.removesuffix("_scale") for name in read_headers(tmp_path / "out") if name.endswith("_scale")}
    linear = {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert {name for name in packed if ".experts." not in name} == {*linear, "lm_head.weight"}
    groups = config_of(tmp_path / "out")["config_groups"].values()
    assert [group["input_activations"] is not None for group in groups] == [bits == "fp8", False]


@pytest.mark.journeys
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_other_families_too(family, tmp_path):
    changes = {"intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1 + (family == "deepseek_v3")}
    model = bfloat16(write_checkpoint(tmp_path / "original", family, **changes))
    said = locum.export(model, to="compressed-tensors", rest="4", out=tmp_path / "out")
    assert ("kv_b_proj" in said["form"]) == (family == "deepseek_v3")  # rows of 16: no whole group
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(load_model(tmp_path / "out"))
    )
    assert not any(
        "gate.weight_" in name or "norm" in name for name in read_headers(tmp_path / "out") if "_scale" in name
    )


def test_float32_stays_exact_and_zeros_stay_zeros(tmp_path):
    model = write_checkpoint(tmp_path / "original", "qwen3_moe", num_hidden_layers=1, moe_intermediate_size=32)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    tensors[name].zero_()
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    locum.export(model, to="compressed-tensors", rest="4", out=tmp_path / "out")
    found = decompressed(tmp_path / "out")
    assert not found[name].any() and all(tensor.isfinite().all() for tensor in found.values())
    huge = found["model.layers.0.mlp.experts.1.up_proj.weight"] / tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert 0.8 < float(huge.median()) < 1.2
    live = load_model(tmp_path / "out").state_dict()
    assert torch.equal(live["model.layers.0.mlp.experts.down_proj"][3], found[name.replace(".2.", ".3.")])


@pytest.mark.journeys
def test_gptq_loses_less_on_what_experts_are_given(narrow, tmp_path, monkeypatch):
    """Written and read back, against Gram matrices of inputs that hang together."""
    monkeypatch.setattr(compression, "NUMBERS", 2**20)
    generator, seen = torch.Generator().manual_seed(2), {}
    for e, width in itertools.product(range(8), (32, 96)):
        x_TI = torch.randn(64, 6, generator=generator) @ torch.randn(6, width, generator=generator)
        seen[e, width] = (x_TI.T @ x_TI / 64).double()
    before, errors = load_file(narrow / "model.safetensors"), {}
    for how, grams in (("nearest", None), ("gptq", lambda layer, e: (seen[e, 32], seen[e, 96]))):
        made, errors[how] = Compression(open_source(narrow), scheme_of("4", 32), grams=grams), 0.0
        made.write(tmp_path / how, 2**30)
        found = decompressed(tmp_path / how)
        for name, weight in made.weights.items():
            lost_OI = (before[name].float() - found[name].float()).double()
            errors[how] += float((lost_OI @ seen[weight.expert, lost_OI.shape[1]] * lost_OI).sum())
    assert errors["gptq"] < 0.8 * errors["nearest"]


def test_a_tied_head_is_written_too(tmp_path):
    model = write_checkpoint(tmp_path / "original", intermediate_size=32, tie_word_embeddings=True)
    locum.export(model, to="compressed-tensors", rest="8", out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert torch.equal(logits(stock), logits(load_model(tmp_path / "out")))


def test_what_it_cannot_hold_is_refused_with_the_way(small, narrow, statistics_file, tmp_path):
    quantised, _ = write_quantised(tmp_path / "fp8", "fp8-scaled")
    stacked = write_checkpoint(tmp_path / "gpt", "gpt_oss")
    for model, given, words in (
        (small, (), "--to stock"),
        (quantised, (), "quantised already"),
        (stacked, (), "keeps each expert's weights apart"),
        (narrow, ("--group", "64"), r"needs rows of whole groups of 64"),
        (narrow, ("--group", "48"), r"--group is 48; allowed: 32, 64, 128"),
        (narrow, ("--bits", "3"), "allowed: 4, 8, fp8, mxfp4, nvfp4"),
        (narrow, ("--rest", "2"), "allowed: 4, 8, fp8, mxfp4, nvfp4"),
        (narrow, ("--statistics", tmp_path / "none"), "none"),
        (narrow, ("--statistics", statistics_file), "belong to another checkpoint"),
    ):
        result = command("export", model, "--to", "compressed-tensors", *given, "--out", tmp_path / "out")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_leave_nothing(tmp_path):
    model = write_checkpoint(tmp_path / "original", "qwen3_moe", num_hidden_layers=1, moe_intermediate_size=32)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.7.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts\.7\.up_proj\.weight are not finite"):
        locum.export(model, to="compressed-tensors", out=tmp_path / "out")
    assert tree(tmp_path) == before


def test_bits_that_headers_do_not_tell_apart_are_refused():
    groups = [scheme_of("4", 128).group(["a"], True), scheme_of("8", 64).group(["b"], False)]
    with pytest.raises(UnsupportedModel, match="which is none of the number formats known"):
        declared_formats(quantization_config(groups))
    assert declared_formats(quantization_config([groups[0], scheme_of("8", 128).group(["b"], False)]))


@pytest.mark.journeys
def test_verify_takes_it(narrow, tmp_path):
    locum.export(narrow, to="compressed-tensors", rest="8", out=tmp_path / "out")
    checks = locum.verify(tmp_path / "out", engine="transformers", prompts=2, new_tokens=4, long_tokens=16)
    assert not [check for check in checks if check.result == "failed"], checks


def test_the_fault_is_that_of_the_options(narrow):
    assert CompressedTensors().fault(narrow) == ""
    assert "whole groups of 128" in CompressedTensors(group=128).fault(narrow)
    assert CompressedTensors(bits="fp8", group=128).fault(narrow) == ""
