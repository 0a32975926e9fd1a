"""What `inspect` ends with: what the method of choice would save, and the command to type next."""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import shutil

import pytest

import locum
from locum.methods import METHODS
from locum.shapes import LayerShape, ModelShape
from locum.stages.inspection import METHOD_OF_CHOICE, even_statistics, would_save
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint

WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 16}


def model(*experts, width=768):
    """A model's shape, one layer for every number of experts."""
    layers = [LayerShape(f"{i}", n, 2, 2048, width, f"r{i}", "softmax", True) for i, n in enumerate(experts)]
    count = sum(layer.num_experts * layer.parameters() for layer in layers)
    return ModelShape("made up", tuple(layers), count + 1000, 2 * count + 2000, 2)


def test_the_method_of_choice_is_the_default():
    for stage in (locum.plan, locum.compress):
        assert inspect.signature(stage).parameters["method"].default == METHOD_OF_CHOICE


@pytest.mark.parametrize("experts", [(64, 64, 64), (64, 128, 64, 32), (256,)])
def test_sizes_are_those_of_a_uniform_selection(experts):
    """Counted by hand: n of a layer's E experts go, three bases come, and n adapters of rank 16."""
    shape = model(*experts)
    said = would_save(shape)
    assert (said["method"], said["remove"], said["estimate"], said["refused"]) == ("lightmoe", 0.5, True, None)
    dense, adapter = 3 * 2048 * 768, 3 * 16 * (2048 + 768)
    left = said["parameters"][1] - 1000
    assert abs(left - sum(experts) * dense / 2) <= len(experts) * dense  # an expert of every layer, at most
    if len(set(experts)) == 1:
        sizes = [(experts[0] - n + 3) * dense + n * adapter for n in range(experts[0])]
        assert left == len(experts) * min(sizes, key=lambda size: abs(size - experts[0] * dense / 2))
    assert said["bytes"][1] == 2 * left + 2000


def test_it_is_near_what_real_statistics_plan(checkpoint, statistics_file, tmp_path):
    folder = write_checkpoint(tmp_path / "wide", **WIDE)
    words = tmp_path / "words.txt"
    words.write_text("the red fox ran over blue hills and then slept. " * 2000)
    would = locum.inspect(folder)["would_save"]
    statistics = locum.calibrate(folder, data=str(words), tokens=2048, length=64, out=tmp_path / "statistics")
    shape = locum.read_shape(folder)
    planned = locum.plan(statistics, remove=0.5).size(shape)
    one_expert = 3 * 128 * 128
    assert abs(planned.parameters - would["parameters"][1]) <= one_expert
    assert would["parameters"][0] == shape.parameters
    assert would["bytes"] == [shape.bytes, shape.bytes - 4 * (shape.parameters - would["parameters"][1])]


def test_a_method_that_reads_no_statistics_is_no_estimate(monkeypatch):
    assert would_save(model(8, 8), method="decompose")["estimate"]
    monkeypatch.setitem(METHODS._items, "decompose", functools.partial(METHODS["decompose"], score="none", start="svd"))
    assert not would_save(model(8, 8), method="decompose")["estimate"]


@pytest.mark.parametrize("method", ["decompose", "lightmoe", "mone", "prune", "replace"])
def test_other_methods_plan_from_even_statistics_too(method):
    shape = model(32, 32)
    said = would_save(shape, method=method, remove=0.25)
    assert said["refused"] is None
    removed = (shape.parameters - said["parameters"][1]) / (shape.parameters - 1000)
    assert removed == pytest.approx(0.25, abs=0.5 / 32)


def test_what_is_out_of_reach_is_said(checkpoint):
    """A tiny layer: three shared bases and adapters of rank 16 are as large as its experts."""
    said = json.loads(command("inspect", checkpoint, "--json").stdout)["would_save"]
    assert "--remove 0.5 is out of reach" in said["refused"]
    assert f"lightmoe at --remove 0.5: {said['refused']}" in command("inspect", checkpoint).stdout


def test_it_ends_with_the_next_command(tmp_path, words, monkeypatch):
    """The line can be copied as it is, where text.txt is there, and so can the one after it."""
    folder = write_checkpoint(tmp_path / "a folder's name", **WIDE)
    said = command("inspect", folder).stdout.splitlines()
    would = locum.inspect(folder)["would_save"]
    whole, left = would["bytes"]
    assert said[-3].startswith(f"lightmoe at --remove 0.5 would save about {(whole - left) / whole:.0%}: ")
    assert said[-2] == "next, with your own text in place of text.txt:"
    line = said[-1].strip()
    assert line == f"locum calibrate {shlex.quote(str(folder))} --data text.txt --out stats.safetensors"
    assert line == json.loads(command("inspect", folder, "--json").stdout)["next"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(words, "text.txt")
    result = command(*shlex.split(line)[1:], "--tokens", 512, "--length", 64)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "stats.safetensors").is_file()


def test_after_compressing_comes_recovery_and_then_evaluation(small, pruned, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(words, "text.txt")
    for folder, how in ((small, ""), (pruned, " --how lora")):
        said = locum.inspect(folder)
        assert said["would_save"] is None
        assert said["next"] == f"locum recover {folder} --data text.txt{how} --out recovered"
        result = command(*shlex.split(said["next"])[1:], "--steps", 1, "--length", 64, "--batch-size", 1)
        assert result.exit_code == 0, result.stderr
        assert locum.inspect("recovered")["next"] == "locum eval recovered --data text.txt"
        shutil.rmtree("recovered")


def test_a_folder_without_notes_that_holds_containers_is_evaluated(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "lost")
    for name in ("locum.json", "plan.json"):
        (folder / name).unlink()
    assert locum.inspect(folder)["next"] == f"locum eval {folder} --data text.txt"


def test_even_statistics_take_no_memory():
    """Grams of a real layer would be gigabytes."""
    layers = even_statistics(model(64), ("input_gram", "count")).layers["0"]
    assert (layers["input_gram"].shape, layers["count"].shape) == ((1, 64, 2048, 2048), (1, 64))
    assert all(tensor.untyped_storage().nbytes() == 8 for tensor in layers.values())
