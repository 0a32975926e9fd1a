"""Checkpoints with experts and stand-ins in few bits, from the command to the reloaded model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.streamed import stream_model
from locum.models.families import find_layers
from locum.models.layer_major import passes
from locum.models.stored import write_model
from locum.plans.bits import FewBits
from locum.plans.plan import KEPT, Base, LayerPlan, Plan, make_plan, stand_in
from locum.plans.plan_file import load_plan
from locum.shapes import ModelShape
from locum.stats.statistics_file import load_statistics
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_rows
from making.tiny_models import tiny_ids, tiny_model

SLOTS = (
    *[KEPT] * 3,
    stand_in(0, 2, "whitened"),
    stand_in(0, 3, "svd"),
    stand_in(None, 3, "svd"),
    KEPT,
    stand_in(constant=True),
)


def mixed(shape: ModelShape) -> Plan:
    """In the first layer all in int4 by gptq, in the second in int3 by nearest."""
    layers = [LayerPlan(x.name, SLOTS, (Base((3, 4), (0.5, 0.5)),)) for x in shape.layers]
    kinds = (FewBits("int4-g32", "gptq"), FewBits("int3-g32", "nearest"))
    return make_plan(shape, [kinds[i % 2].applied(layers, shape)[i] for i in range(len(layers))])


only_olmoe = pytest.mark.parametrize("made", ["olmoe"], indirect=True)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.set_experts_implementation("eager")
    return copy.deepcopy(model).eval()(tiny_ids(), use_cache=False).logits


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def made(request, tmp_path_factory):
    """A checkpoint, in bfloat16 where experts have biases, statistics with Gram matrices, and what the plan makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_checkpoint(folder / "model", request.param)
    if request.param == "gpt_oss":
        tiny_model(request.param, vocab_size=320, max_position_embeddings=512).bfloat16().save_pretrained(model)
    data = write_rows(folder / "a.jsonl")
    locum.calibrate(model, data=[str(data)], tokens=512, length=32, batch_size=4, out=folder / "stats.safetensors")
    statistics = load_statistics(folder / "stats.safetensors")
    plan = mixed(read_shape(model))
    out = locum.apply(model, plan=plan, statistics=statistics, out=folder / "few")
    return folder, model, statistics, plan, out


def test_files_are_those_of_the_live_model_and_as_large_as_the_plan_said(made):
    folder, model, statistics, plan, out = made
    live = apply_plan(load_model(model), plan, statistics)
    write_model(live, folder / "saved")
    here, there = load_file(out / "model.safetensors"), load_file(folder / "saved" / "model.safetensors")
    assert here.keys() == there.keys()
    assert all(here[n].dtype == t.dtype and torch.equal(here[n], t) for n, t in there.items())
    shape, promised = read_shape(out), plan.size(read_shape(model))
    assert sum(t.nbytes for t in here.values()) == promised.bytes == shape.bytes
    assert shape.parameters == promised.parameters and shape.expert_itemsize == read_shape(model).expert_itemsize
    assert {t.dtype for n, t in here.items() if "dense_int" in n and "bias" not in n} == {torch.uint8}


def test_transformers_loads_it_to_the_bit_in_any_dtype_and_it_stays_packed(made):
    _, model, statistics, plan, out = made
    live = apply_plan(load_model(model), plan, statistics)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(live), logits(again))
    assert again.generate(tiny_ids()[:, :4], max_new_tokens=3, do_sample=False).shape == (3, 7)
    wide = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for layer in find_layers(wide):
        ours = dict(layer.experts.named_parameters())
        theirs = again.get_submodule(layer.shape.name)
        packed = layer.experts.layout.packed_tensors
        assert packed and all(torch.equal(ours[name], theirs.get_parameter(name)) for name in packed)
        assert {ours[name].dtype for name in ours.keys() - packed} <= {torch.float32}
    streamed = stream_model(out)
    (found,) = passes(streamed, [lambda: streamed(tiny_ids(), use_cache=False).logits])
    assert torch.equal(found, load_model(out)(tiny_ids(), use_cache=False).logits)


def test_saved_again_it_is_the_same(made, tmp_path):
    out = made[-1]
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path)
    here, there = load_file(out / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)


@pytest.mark.journeys
@only_olmoe
def test_it_is_exported_as_numbers_and_refused_where_all_is_to_be_trained_or_compressed_again(made):
    folder, *_, out = made
    full = ("--how", "full", "--steps", 1, "--out", folder / "recovered")
    said = command("recover", out, "--data", folder / "a.jsonl", *full)
    assert said.exit_code == 2 and "those in few bits (int4-g32, int3-g32) stay as they are" in said.output, said.output
    said = command("export", out, "--to", "vllm", "--out", folder / "vllm")
    assert said.exit_code == 2 and "weights in few bits" in said.output, said.output
    said = command("calibrate", out, "--data", folder / "a.jsonl", "--out", folder / "again")
    assert said.exit_code == 2 and "compressed already" in said.output, said.output
    shape = read_shape(folder / "model")
    whole = FewBits("int4-g32", "nearest").applied([], shape)
    few = locum.apply(folder / "model", plan=make_plan(shape, whole), out=folder / "kept")
    said = command("export", few, "--to", "stock", "--out", folder / "stock")
    assert said.exit_code == 0 and "what was in int4-g32 as numbers" in said.output, said.output
    stock = AutoModelForCausalLM.from_pretrained(folder / "stock").float()
    near = logits(AutoModelForCausalLM.from_pretrained(few).float())
    assert torch.allclose(logits(stock), near, atol=0.02 * float(near.abs().max()))


@pytest.mark.journeys
@only_olmoe
def test_verify_finds_nothing_wrong(made):
    folder, model, *_, out = made
    checks = locum.verify(
        out,
        engine="transformers",
        original=model,
        statistics=folder / "stats.safetensors",
        prompts=1,
        new_tokens=2,
        long_tokens=2,
    )
    assert not [check for check in checks if check.result == "failed"], checks


# --- the option


@only_olmoe
def test_bits_are_planned_under_the_same_budget(made):
    folder = made[0]
    stats, shape = folder / "stats.safetensors", read_shape(folder / "model")
    sizes = {}
    for bits in (None, "8", "4", "3", "2", "fp8-scaled"):
        options = [] if bits is None else ["--bits", bits]
        target = ["--remove", "0.25"] if bits is None else []
        said = command("plan", stats, "--method", "prune", *target, *options, "--out", folder / f"{bits}.json")
        assert said.exit_code == 0, said.output
        sizes[bits] = load_plan(folder / f"{bits}.json").size(shape).bytes
    assert sizes["8"] > sizes["4"] > sizes["3"] > 0 and sizes["3"] != sizes["2"] < sizes["4"]
    kept = load_plan(folder / "4.json")
    assert {slot.parts[0].format for layer in kept.layers for slot in layer.slots} == {"int4-g32"}
    assert kept.removed(shape) == 0 and load_plan(folder / "fp8-scaled.json").formats == ("fp8-scaled",)
    limit = (sizes["4"] + shape.bytes - shape.bytes_of_experts) // 2
    said = command("plan", stats, "--method", "prune", "--fit", limit, "--bits", 4, "--out", folder / "fit.json")
    assert said.exit_code == 0, said.output
    fitted = load_plan(folder / "fit.json")
    assert sizes["4"] > fitted.size(shape).bytes <= limit and fitted.formats == ("int4-g32",)
    few = command(
        "plan", stats, "--method", "prune", "--fit", sizes["4"], "--bits", 4, "--group", 128, "--out", folder / "g"
    )
    assert few.exit_code == 0 and load_plan(folder / "g").formats == ("int4-g128",)
    assert load_plan(folder / "g").removed(shape) == 0  # it fits: nothing has to go


@only_olmoe
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--bits 5", "--bits is 5; allowed: 2, 3, 4, 8, or the name of a format"),
        ("--bits int4", "unknown format 'int4'"),
        ("--bits 4 --group 48", "--group is 48; allowed: 32, 64, 128"),
        ("--bits 4 --quantiser gptk", "unknown quantiser 'gptk': did you mean 'gptq'?"),
        ("", "give exactly one of --remove"),
    ],
)
def test_wrong_options_are_one_line(made, options, words):
    said = command("plan", made[0] / "stats.safetensors", "--method", "prune", *options.split())
    assert said.exit_code == 2 and words in " ".join(said.output.split()), said.output


@only_olmoe
def test_gram_matrices_are_asked_for_where_they_are_missing(made):
    folder, model, *_ = made
    locum.calibrate(
        model,
        data=[str(folder / "a.jsonl")],
        tokens=64,
        length=32,
        gram=False,
        out=folder / "thin.safetensors",
        force=True,
    )
    said = command("plan", folder / "thin.safetensors", "--method", "prune", "--bits", 4)
    assert said.exit_code == 2 and "or plan with --quantiser nearest" in said.output, said.output
    said = command("plan", folder / "thin.safetensors", "--method", "prune", "--bits", 4, "--quantiser", "nearest")
    assert said.exit_code == 0, said.output
    said = command("plan", model, "--method", "compressed-experts", "--bits", 4)
    assert said.exit_code == 2 and "--quantiser gptq reads Gram matrices" in said.output, said.output


@pytest.mark.journeys
@only_olmoe
def test_compress_does_all_of_it(made):
    folder, model, *_ = made
    given = ("--data", folder / "a.jsonl", "--tokens", 256, "--length", 32, "--remove", 0.3, "--rank", 2, "--bits", 4)
    said = command("compress", model, *given, "--out", folder / "small")
    assert said.exit_code == 0, said.output
    plan = load_plan(folder / "small" / "plan.json")
    assert plan.formats == ("int4-g32",) and "gptq" in plan.dumps()
    assert read_shape(folder / "small").bytes == plan.size(read_shape(model)).bytes
    config = json.loads((folder / "small" / "config.json").read_text())["quantization_config"]
    assert all(
        s["format"] == "int4-g32" for x in config["layers"].values() for s in x["stacks"] if s["part"] != "own_biases"
    )
    training = ("--recover", "lora", "--recover-steps", 1, "--recover-length", 32, "--recover-batch-size", 1)
    said = command("compress", model, *given, *training, "--recover-keep-size", "--out", folder / "trained")
    assert said.exit_code == 0 and read_shape(folder / "trained").bytes == plan.size(read_shape(model)).bytes, (
        said.output
    )
