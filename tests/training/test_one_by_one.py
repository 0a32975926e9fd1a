"""Layer-wise recovery with one decoder layer of both models in memory: the bits of whole models, and it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.notes import plan_of
from locum.checkpoints.skeleton import open_source
from locum.checkpoints.streamed import stream_model
from locum.models.layer_major import NOTE, WholeLayers
from locum.models.waiting import WaitingStates
from locum.runs import beside
from locum.stages.layerwise import Retrained
from locum.training.one_by_one import KeptLayers, OneByOne
from locum.training.options import make_recovery
from locum.training.states import State, load_state, save_state
from making.checkpoints import locum as command
from making.training import tiny_tokens

SHORT = {"how": "layerwise", "steps": 8, "batch_size": 2, "learning_rate": 1e-2, "warmup_fraction": 0.0}


def whole(folder):
    model = load_model(folder, dtype=torch.float32)
    setattr(model, NOTE, WholeLayers(model.model.layers))
    return model


def streamed(folder):
    return stream_model(folder, dtype=torch.float32)


def trained(model, original, plan, folder, **options):
    """The tensors of every trained layer, and the losses by layer."""
    losses: dict[str, list[float]] = {}
    kept = KeptLayers(folder, {"asked": "the same"})
    kept.open()
    options = make_recovery({**SHORT, **options})
    note = lambda line: losses.setdefault(line["layer"], []).append(line["loss"])  # noqa: E731
    OneByOne(model, original, plan, tiny_tokens(), options, kept, torch.bfloat16, log=note).run(None)
    return [kept.load(index) for index in range(2)], losses


@pytest.mark.parametrize(("routers", "on_disk", "precision"), [(False, False, "fp32"), (True, True, "bf16")])
def test_streamed_models_are_trained_to_the_bits_of_whole_ones(
    checkpoint, small, tmp_path, routers, on_disk, precision, monkeypatch
):
    """Where the hidden states of the streamed one lie on the disk, too."""
    monkeypatch.setattr("locum.checkpoints.on_call.LARGE", 1)  # embedding and head are there while they are called
    plan, put = plan_of(small), []
    models = tuple(tuple(map(open_, (small, checkpoint))) for open_ in (whole, streamed))
    asked = {"routers": routers, "precision": precision}
    made = [trained(*models[0], plan, tmp_path / "0", **asked)]
    if on_disk:
        monkeypatch.setattr("locum.training.one_by_one.HELD", 0)
    monkeypatch.setattr(
        WaitingStates, "put", lambda *asked, real=WaitingStates.put: put.append(real(*asked)) or put[-1]
    )
    made.append(trained(*models[1], plan, tmp_path / "1", **asked))
    for one, two in zip(*(tensors for tensors, _ in made), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        assert any("router" in name or "gate.weight" in name for name in one) == routers
    assert all(min(losses[-3:]) < losses[0] for losses in made[0][1].values()) and len(made[0][1]) == 2
    assert [bool(away.storages) for away in put] == [on_disk] * (2 * 3 if on_disk else 0)  # layers, batches
    layers = getattr(models[1][0], NOTE).modules
    assert not [p for layer in layers for p in layer.parameters() if p.device.type != "meta"]


@pytest.mark.journeys
def test_a_command_gives_the_same_files_whole_or_streamed_at_once_or_interrupted(checkpoint, small, words, tmp_path):
    asked = {"data": [str(words)], "length": 32, "validation_tokens": 256, **SHORT}
    first = locum.recover(small, out=tmp_path / "once", stream=False, **asked)
    assert first["kept_step"] == 8 and first["validation_loss"] < first["validation_loss_before"]

    def stop(stage, done, total):
        if done == 11:  # in the second layer
            raise KeyboardInterrupt

    asked["stream"] = True
    with pytest.raises(KeyboardInterrupt):
        locum.recover(small, out=tmp_path / "again", progress=stop, **asked)
    left = beside(tmp_path / "again", "recover")
    assert [file.name for file in left.glob("layer-*")] == ["layer-00000.safetensors"]
    steps = []
    told = locum.recover(small, out=tmp_path / "again", progress=lambda stage, done, total: steps.append(done), **asked)
    assert steps[0] == 9 and not left.exists() and told["loss"] == first["loss"] > 0
    once, again = (tmp_path / "once", tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (once / name).read_bytes() == (again / name).read_bytes()
    one, before = (load_file(folder / "model.safetensors") for folder in (once, small))
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    assert one.keys() == before.keys() and moved and all(".experts." in name for name in moved)
    logs = [[json.loads(x) for x in (out / "recovery.jsonl").read_text().splitlines()] for out in (once, again)]
    assert [line["event"] for line in logs[0]] == ["start", *["step"] * 16, "validation", "validation", "kept"]
    assert [line for line in logs[1] if line["event"] != "resume"][1:] == logs[0][1:]
    live = KeptLayers(tmp_path / "kept", {})
    live.save(1, {name: tensor for name, tensor in one.items() if name in moved and ".1." in name})
    put = Retrained(open_source(small), live, 2).put_into(load_model(small)).state_dict()
    assert all(torch.equal(tensor, one[name] if ".1." in name else before[name]) for name, tensor in put.items())


def test_what_answers_something_else_is_set_aside_with_a_word(tmp_path, caplog):
    folder = tmp_path / "work"
    KeptLayers(folder, {"seed": 1}).save(0, {"a": torch.ones(2)})
    same = KeptLayers(folder, {"seed": 1})
    same.open()
    assert torch.equal(same.load(0)["a"], torch.ones(2)) and same.load(1) is None and not caplog.text
    other = KeptLayers(folder, {"seed": 2})
    other.open()
    assert other.load(0) is None and (tmp_path / "work.aside" / "layer-00000.safetensors").is_file()
    assert "something else: seed was 1 and is 2; it was set aside" in caplog.text
    other.save(0, {"a": torch.ones(2)})
    assert load_state(folder, {}, restart=False).step == 0 and not folder.exists()
    assert "an interrupted run that trained layer by layer; it was set aside" in caplog.text
    save_state(folder, {}, State(step=1))
    other.open()
    assert not any(folder.iterdir()) and "an interrupted run that trained all layers at once; it was" in caplog.text


def test_what_does_not_go_layer_by_layer_is_refused(small, words, tmp_path):
    asked = ("--data", words, "--out", tmp_path / "x", "--stream")
    said = command("recover", small, "--how", "lora", *asked)
    assert said.exit_code == 2 and "--stream trains one layer at a time, and --how lora all at once" in said.stderr
    said = command("recover", small, "--how", "layerwise", "--balance", "0.1", *asked)
    assert (
        said.exit_code == 2
        and "every layer by its own error and validates at both ends, to which --balance can add nothing" in said.stderr
    )
