"""The demonstration, on a stand-in for the bundled model; and whether the bundled model has learnt to read."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

import locum
from locum import bundled as package
from locum.data.tokens import load_tokens
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_text

pytestmark = pytest.mark.journeys  # long: whole commands in processes of their own

demo = importlib.import_module("locum.demonstration")
METHODS = ("lightmoe", "reap")
MODELS = ["original", *(name + state for name in METHODS for state in ("", " recovered"))]
bundled = pytest.mark.skipif(
    not (package.MODEL / "model.safetensors").is_file(), reason="the reference model is not here"
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A reference folder with a tiny model and two domains of text."""
    reference = tmp_path / "reference"
    (reference / "text").mkdir(parents=True)
    # Large enough that adapters of rank 4 save something, as in the bundled model.
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 16}
    write_checkpoint(reference / "model", **sizes)
    write_text(reference / "text" / "code.txt", 90_000, seed=4)
    write_text(reference / "text" / "plays.txt", 90_000, seed=5)
    (reference / "text" / "LICENSES.txt").write_text("not data")
    monkeypatch.setattr(package, "REFERENCE", reference)
    monkeypatch.setattr(package, "MODEL", reference / "model")
    return reference


def test_the_demo_finishes(stand_in, tmp_path):
    out = tmp_path / "out"
    result = command("demo", "--steps", 2, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[-1] == str(out / "report.html")
    for name in (*MODELS, "size", "code", "plays", "all", "seconds", "bits per byte"):
        assert name in result.stdout
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == set(MODELS)
    original = [row for row in rows if row["model"] == "original" and row["metric"] == "loss"]
    assert sorted(row["domain"] for row in original) == ["all", "code", "plays"]  # measured once in the results
    for name in MODELS[1:]:
        assert locum.inspect(out / name)["bytes"] < locum.inspect(stand_in / "model")["bytes"]
    recoveries = [json.loads((out / f"{name} recovered" / "locum.json").read_text())["recovery"] for name in METHODS]
    for option in ("how", "rank", "batch_size", "learning_rate", "steps", "length", "tokens", "seed"):
        assert len({said[option] for said in recoveries}) == 1, f"methods are recovered with another {option}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "reference"]


def test_the_demo_as_json_and_again(stand_in, tmp_path):
    out = tmp_path / "out"
    result = command("demo", "--steps", 1, "--out", out, "--json")
    said = json.loads(result.stdout)
    assert said["report"] == str(out / "report.html")
    assert [model["model"] for model in said["models"]] == MODELS
    assert set(said["models"][0]["bits_per_byte"]) == {"code", "plays", "all"}
    assert all(model["seconds"] > 0 for model in said["models"][1:])
    assert command("demo", "--steps", 1, "--out", out).exit_code == 2
    assert locum.demo(steps=1, out=out, force=True)["report"] == said["report"]


def test_a_demo_that_fails_leaves_nothing(stand_in, tmp_path):
    (stand_in / "text" / "plays.txt").write_text("too short")
    result = command("demo", "--steps", 1, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "plays" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reference"]


@bundled
def test_the_bundled_model_can_read():
    """Held-out text costs it far less than a guess among all tokens."""
    model = locum.checkpoints.load.load_model(package.MODEL)
    tokenizer = locum.checkpoints.read.load_tokenizer(package.MODEL)
    tokens = load_tokens(
        package.reference_data(), tokenizer, split="test", length=128, tokens=128 * 16, keep_partial=True
    )
    with torch.no_grad():
        logits = model(tokens.ids_BS).logits[:, :-1]
    mask = tokens.loss_mask_BS[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[mask].float(), tokens.ids_BS[:, 1:][mask]).item()
    assert loss < 0.6 * math.log(logits.shape[-1])


@bundled
def test_the_bundled_model_is_what_it_should_be():
    about = locum.inspect(package.MODEL)
    assert about["model_type"] == "olmoe"
    assert about["bytes"] <= 26_000_000
    assert sum(f.stat().st_size for f in package.MODEL.iterdir()) <= 27_000_000
    for layer in about["layers"]:
        assert 16 <= layer["num_experts"] <= 32
        assert 2 <= layer["top_k"] <= 4
    domains = [name.partition("=")[0] for name in package.reference_data()]
    assert len(domains) >= 6
    assert (package.REFERENCE / "text" / "LICENSES.txt").is_file()
