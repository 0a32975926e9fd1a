"""Layer-wise recovery with one decoder layer of both models in memory: the bits of whole models, and it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.notes import plan_of
from locum.checkpoints.streamed import stream_model
from locum.models.layer_major import NOTE
from locum.runs import beside
from locum.training.one_by_one import KeptLayers, OneByOne
from locum.training.options import make_recovery
from making.checkpoints import locum as command
from making.training import tiny_tokens

SHORT = {"how": "layerwise", "steps": 8, "batch_size": 2, "learning_rate": 1e-2, "warmup_fraction": 0.0}


class WholeLayers:
    """The layers of a model that is in memory, run as those of a streamed one."""

    def __init__(self, modules):
        self.modules = modules

    def bring(self, index):
        pass

    def drop(self, index):
        pass


def whole(folder):
    model = load_model(folder, dtype=torch.float32)
    setattr(model, NOTE, WholeLayers(list(model.model.layers)))
    return model


def streamed(folder):
    return stream_model(folder, dtype=torch.float32)


def trained(model, original, plan, folder, **options):
    """The tensors of every trained layer, and the losses by layer."""
    losses: dict[str, list[float]] = {}
    kept = KeptLayers(folder, {"asked": "the same"})
    options = make_recovery({**SHORT, **options})
    note = lambda line: losses.setdefault(line["layer"], []).append(line["loss"])  # noqa: E731
    OneByOne(model, original, plan, tiny_tokens(), options, kept, torch.bfloat16, log=note).run(None)
    return [kept.load(index) for index in range(2)], losses


@pytest.mark.parametrize("routers", [False, True])
def test_streamed_models_are_trained_to_the_bits_of_whole_ones(checkpoint, small, tmp_path, routers, monkeypatch):
    monkeypatch.setattr("locum.checkpoints.on_call.LARGE", 1)  # embedding and head are there while they are called
    plan = plan_of(small)
    models = tuple(tuple(map(open_, (small, checkpoint))) for open_ in (whole, streamed))
    made = [trained(*pair, plan, tmp_path / f"{i}", routers=routers) for i, pair in enumerate(models)]
    for one, two in zip(*(tensors for tensors, _ in made), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        assert any("router" in name or "gate.weight" in name for name in one) == routers
    assert all(min(losses[-3:]) < losses[0] for losses in made[0][1].values()) and len(made[0][1]) == 2
    layers = getattr(models[1][0], NOTE).modules
    assert not [p for layer in layers for p in layer.parameters() if p.device.type != "meta"]


def test_a_command_that_was_interrupted_goes_on_to_the_same_files(checkpoint, small, words, tmp_path):
    asked = {"data": [str(words)], "length": 32, "stream": True, "validation_tokens": 256, **SHORT}
    first = locum.recover(small, out=tmp_path / "once", **asked)
    assert first["kept_step"] == 8 and first["validation_loss"] < first["validation_loss_before"]

    def stop(stage, done, total):
        if done == 11:  # in the second layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locum.recover(small, out=tmp_path / "again", progress=stop, **asked)
    left = beside(tmp_path / "again", "recover")
    assert [file.name for file in left.glob("layer-*")] == ["layer-00000.safetensors"]
    steps = []
    locum.recover(small, out=tmp_path / "again", progress=lambda stage, done, total: steps.append(done), **asked)
    assert steps[0] == 9 and not left.exists()
    one, two, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "once", tmp_path / "again", small)
    )
    assert one.keys() == two.keys() == before.keys() and all(torch.equal(one[name], two[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    assert moved and all(".experts." in name for name in moved)
    assert locum.load_model(tmp_path / "once") is not None
    log = [json.loads(line) for line in (tmp_path / "once" / "recovery.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log] == ["start", *["step"] * 16, "validation", "validation", "kept"]


def test_what_cannot_go_layer_by_layer_is_refused(small, words, tmp_path):
    asked = ("--data", words, "--out", tmp_path / "x", "--stream")
    said = command("recover", small, "--how", "lora", *asked)
    assert said.exit_code == 2 and "--stream trains one layer at a time, and --how lora all at once" in said.stderr
    said = command("recover", small, "--how", "layerwise", "--precision", "bf16", *asked)
    assert said.exit_code == 2 and "--precision fp32" in said.stderr
