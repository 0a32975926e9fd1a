"""`locum export`: whole experts compute what stand-ins do, files are those of the family, and the rest is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import locum
from engines.made import PLANS, cycle, members, statistics
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model, open_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.skeleton import layouts_of, read_shape
from locum.containers.container import StandInExperts
from locum.errors import CheckpointError, EngineError, OptionError, UnsupportedModel
from locum.exports import gguf_run
from locum.exports.gguf import Gguf
from locum.exports.stock import stock_faults
from locum.exports.target import write_form
from locum.exports.whole_experts import to_stock
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, LayerPlan, make_plan, stand_in
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint
from making.tiny_models import CONFIGS, tiny_ids, tiny_model


@torch.no_grad()
def logits(model):
    return model(tiny_ids()).logits


def mixed(layers):
    """Every part that whole experts can hold, in layers that keep equally many."""
    patterns = (
        (KEPT, stand_in(0, 4), stand_in(0), DROPPED),
        (stand_in(None, 3, "svd"), stand_in(0, 2, "svd"), NOTHING, DROPPED),
    )
    plans = []
    for layer, pattern in zip(layers, patterns, strict=True):
        slots = cycle(layer, *pattern)
        plans.append(LayerPlan(layer.name, slots, (members(slots, 0),)))
    return plans


@pytest.mark.parametrize("model_type", CONFIGS)
def test_whole_experts_compute_what_stand_ins_do(model_type):
    model = tiny_model(model_type)
    shape = shape_of(model)
    plan = make_plan(shape, mixed(shape.layers))
    apply_plan(model, plan)
    with torch.no_grad():
        for layer in find_layers(model):
            for stack in layer.experts.adapters:  # as if they had been trained
                for parameter in stack.parameters():
                    parameter.normal_(0, 0.3)
    before = logits(model)
    stock = to_stock(model)
    assert not any(isinstance(module, StandInExperts) for module in stock.modules())
    assert torch.allclose(logits(stock), before, atol=1e-4 * float(before.abs().max()))
    assert not hasattr(stock.config, "quantization_config")


def written(folder: Path, plan_of, **changes) -> Path:
    original = write_checkpoint(folder / "original", **changes)
    shape = read_shape(original)
    seed = torch.Generator().manual_seed(3)
    plan = make_plan(shape, plan_of(shape.layers))
    return locum.apply(original, plan=plan, statistics=statistics(shape, seed), out=folder / "made")


WITHOUT_LOCUM = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert "locum" not in sys.modules
torch.save(model(torch.arange(2, 40)[None]).logits, sys.argv[2])
"""


@pytest.mark.journeys
def test_an_exported_folder_needs_no_locum(tmp_path):
    made = written(tmp_path, mixed)
    result = command("export", made, "--to", "stock", "--out", tmp_path / "stock", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["bytes"] == [locum.inspect(made)["bytes"], locum.inspect(tmp_path / "stock")["bytes"]]
    assert said["times_larger"] == said["bytes"][1] / said["bytes"][0]
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_experts"] == 6
    names = set(read_headers(tmp_path / "stock"))
    assert {
        f"model.layers.1.mlp.experts.{e}.{p}_proj.weight" for e in range(6) for p in ("gate", "up", "down")
    } <= names
    assert not any(re.search(r"experts\.(gate_up|down)_proj", name) for name in names)
    run = [sys.executable, "-c", WITHOUT_LOCUM, str(tmp_path / "stock"), str(tmp_path / "logits.pt")]
    subprocess.run(run, check=True, capture_output=True)
    with torch.no_grad():
        expected = load_model(made)(torch.arange(2, 40)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4)


@pytest.mark.journeys
def test_a_tied_head_is_written_too(tmp_path):
    """For engines that do not tie it. transformers does, in silence."""
    made = written(tmp_path, mixed, tie_word_embeddings=True)
    assert "lm_head.weight" not in read_headers(made)
    said = locum.export(made, to="stock", out=tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert said["bytes"][1] == sum(tensor.nbytes for tensor in tensors.values())
    run = [sys.executable, "-c", WITHOUT_LOCUM, str(tmp_path / "stock"), str(tmp_path / "logits.pt")]
    assert "tie" not in subprocess.run(run, check=True, capture_output=True, text=True).stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shape = read_shape(tmp_path / "stock")
    assert shape.model == shape_of(model)
    plan = make_plan(shape, PLANS["uniform"](shape.layers))
    pruned = locum.apply(tmp_path / "stock", plan=plan, out=tmp_path / "pruned")
    assert plan.size(shape).bytes == read_shape(pruned).bytes
    assert "lm_head.weight" in read_headers(pruned)  # what a plan does not touch is copied
    with pytest.raises(UnsupportedModel, match="nothing to export"):
        locum.export(pruned, to="stock", out=tmp_path / "again")


def test_what_was_opened_is_saved_as_its_family_does(tmp_path):
    """Pruned unequally, opened, pruned to equal counts: an ordinary checkpoint, whose files other engines read."""
    uneven = written(tmp_path, lambda layers: [LayerPlan(layers[0].name, cycle(layers[0], KEPT, KEPT, KEPT, DROPPED))])
    assert layouts_of(uneven)
    shape = read_shape(uneven)
    slots = [(KEPT,) * 6, (KEPT,) * 6 + (DROPPED,) * 2]
    plan = make_plan(shape, [LayerPlan(x.name, s) for x, s in zip(shape.layers, slots, strict=True)])
    again = locum.apply(uneven, plan=plan, out=tmp_path / "again")
    assert not layouts_of(again)
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in read_headers(again)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = apply_plan(open_model(uneven), plan)(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uneven", "unequal numbers of experts (4 to 6)"),
        ("constants", "constants in place of experts"),
        ("vectors", "a routing policy"),
    ],
)
def test_what_a_stock_layout_cannot_hold_is_named(name, words, tmp_path):
    made = written(tmp_path, PLANS[name])
    assert any(words in fault for fault in stock_faults(made))
    for to in ("stock", "gguf"):
        result = command("export", made, "--to", to, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
        assert "--method prune --remove" in result.stderr
    assert not (tmp_path / "out").exists()


def test_gguf_of_stand_ins_names_them_and_the_way(small, tmp_path):
    result = command("export", small, "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert result.exit_code == 2
    assert "shared bases and low-rank stand-ins" in result.stderr
    assert "--to stock" in result.stderr


@pytest.mark.parametrize(
    "before_it", ["", 'Traceback (most recent call last):\n  File "/a/place.py", line 7, in main\n']
)
def test_a_conversion_that_fails_leaves_nothing(pruned, tmp_path, monkeypatch, before_it):
    failing, said = tmp_path / "python", tmp_path / "said"
    said.write_text(f"{before_it}no such tensor\n")
    failing.write_text(f"#!/bin/sh\ncat '{said}' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("LOCUM_LLAMACPP_PYTHON", str(failing))
    before = tree(tmp_path)
    with pytest.raises(EngineError, match=r"could not be converted to GGUF: no such tensor$"):
        write_form(Gguf("f32"), pruned, tmp_path / "x.gguf")
    assert tree(tmp_path) == before
    monkeypatch.setenv("LOCUM_LLAMACPP_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(OptionError, match="LOCUM_LLAMACPP_PYTHON"):
        write_form(Gguf("f32"), pruned, tmp_path / "x.gguf")


def test_wrong_arguments_are_one_line(pruned, small, tmp_path):
    out = tmp_path / "out"
    for arguments, words in (
        ([pruned, "--to", "stock", "--out", out], "has the stock layout already"),
        ([pruned, "--to", "vllm", "--out", out], "vLLM reads it as it is"),
        ([pruned, "--to", "remote-code", "--out", out], "it loads without Locum"),
        (
            [small, "--to", "onnx", "--out", out],
            "allowed: compressed-tensors, dense, gguf, imatrix, remote-code, stock, vllm",
        ),
        (
            [pruned, "--to", "gguf", "--type", "q4_k", "--out", out],
            "allowed: bf16, f16, f32, iq3_s, iq4_nl, iq4_xs, q2_k",
        ),
        ([small, "--to", "stock", "--out", small], "in use"),
    ):
        result = command("export", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
    assert not out.exists()


def test_faults_are_refused_from_python_too(tmp_path):
    made = written(tmp_path, PLANS["constants"])
    with pytest.raises(UnsupportedModel, match="constants"):
        locum.export(made, to="stock", out=tmp_path / "out")


def test_a_folder_for_remote_code_has_nothing_hidden_and_follows_no_link_out(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("token = secret")
    (folder / "more").mkdir()
    (folder / "more" / "inside.txt").symlink_to(folder / "config.json")
    locum.export(folder, to="remote-code", out=tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {path.name for path in folder.iterdir()} - {".git"} | {"remote_code.py"}
    (tmp_path / "secret").write_text("secret")
    (folder / "more" / "inside.txt").unlink()
    (folder / "more" / "inside.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"inside\.txt leads out of the checkpoint's folder"):
        locum.export(folder, to="remote-code", out=tmp_path / "again")
    (folder / "more" / "inside.txt").unlink()
    os.mkfifo(folder / "more" / "pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        locum.export(folder, to="remote-code", out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("to", ["stock", "remote-code", "vllm", "gguf"])
@pytest.mark.parametrize("change", [lambda t: None, lambda t: t[None], lambda t: t.view(torch.int32)])
def test_a_checkpoint_that_does_not_load_is_not_exported(to, change, small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    name = "model.layers.1.self_attn.k_norm.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: change(tensors[name])}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    result = command("export", folder, "--to", to, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert name in result.stderr and not (tmp_path / "out").exists()


def test_the_converter_runs_no_code_of_a_folder(monkeypatch):
    """It asks for trust_remote_code=True itself, for the tokenizers of some families."""
    asked = []
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoProcessor):
        monkeypatch.setattr(kind, "from_pretrained", lambda *given, **named: asked.append(named["trust_remote_code"]))
    converter, base = types.ModuleType("convert_hf_to_gguf"), types.ModuleType("conversion.base")
    base.TextModel = type("TextModel", (), {"get_vocab_base_pre": None})
    base.ModelBase = type("ModelBase", (), {"get_tensors": None})
    converter.get_model_class = None

    def main() -> None:
        transformers.AutoTokenizer.from_pretrained("x", trust_remote_code=True)
        transformers.AutoConfig.from_pretrained("x")

    converter.main = main
    for name, module in (("convert_hf_to_gguf", converter), ("conversion", base), ("conversion.base", base)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["gguf_run.py", "", "x"])
    gguf_run.main()
    assert asked == [False, False]
