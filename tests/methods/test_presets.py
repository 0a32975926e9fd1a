"""Defaults are the best that is known, `--preset paper` is the method as published, and what defaults read is collected."""

from __future__ import annotations

import types

import psutil
import pytest
import torch

import locum
from locum.errors import OptionError, StatisticsError
from locum.experts.parts.low_rank import STARTS, LowRank
from locum.methods import METHODS
from locum.stages.planning import chosen_method
from locum.stats.on_disk import Stack
from locum.stats.sums import nbytes
from making.checkpoints import locum as command
from making.slots import part_of

GRAMS = STARTS["whitened"].needs
WHITENED_IN_THE_PAPER = (
    "auto",
    "d2-moe",
    "lor-experts",
    "moe-svd",
)  # auto has no paper, and always reads Gram matrices
STARTING = [name for name in METHODS if hasattr(METHODS[name](), "start")]


def test_every_method_with_adapters_starts_whitened():
    assert STARTING == ["d2-moe", "decompose", "lightmoe", "lor-experts", "moe-i2", "moe-svd", "replace"]
    for name in STARTING:
        assert METHODS[name]().start == "whitened" and set(GRAMS) <= set(METHODS[name]().needs())


@pytest.mark.parametrize("name", METHODS)
def test_the_preset_of_the_paper_is_what_was_published(name):
    cls = METHODS[name]
    assert chosen_method(name, {}, "best") == cls()
    assert chosen_method(name, {}, "paper") == cls(**cls.published)
    assert bool(set(GRAMS) & set(chosen_method(name, {}, "paper").needs())) == (name in WHITENED_IN_THE_PAPER)
    for option, value in cls.published.items():  # an option that is given wins, and the preset changes something
        default = getattr(cls(), option)
        given = cls(**cls.published | {option: default})
        assert value != default and chosen_method(name, {option: default}, "paper") == given


def test_an_unknown_preset_is_refused():
    with pytest.raises(OptionError, match="unknown preset 'papr': did you mean 'paper'"):
        chosen_method("lightmoe", {}, "papr")


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("", "whitened"),
        ("--preset paper", "gaussian"),
        ("--method replace", "whitened"),
        ("--method replace --preset paper", "gaussian"),
        ("--method replace --preset paper --no-shared", "svd"),
        ("--method decompose", "whitened"),
        ("--method decompose --preset paper", "svd"),
    ],
)
def test_plans_say_where_adapters_start(line, start, statistics_file, tmp_path):
    given = ("--rank", 2) if "decompose" not in line else ("--multiple", 2)
    result = command("plan", statistics_file, *line.split(), *given, "--remove", 0.4, "--out", tmp_path / "plan.json")
    assert result.exit_code == 0, result.stderr
    slots = [slot for layer in locum.load_plan(tmp_path / "plan.json").layers for slot in layer.slots]
    starts = {part.start for slot in slots if (part := part_of(slot, LowRank))}
    assert starts == {start}


def test_calibration_collects_what_defaults_read_or_plans_say_what_to_do(checkpoint, words, statistics_file, tmp_path):
    assert set(GRAMS) <= set(locum.load_statistics(statistics_file).names)
    given = {"data": [str(words)], "tokens": 512, "length": 64}
    without = locum.calibrate(checkpoint, out=tmp_path / "without", gram=False, **given)
    assert not set(GRAMS) & set(without.names)
    with pytest.raises(
        StatisticsError, match=r"no statistic 'input_gram'.*unless --no-gram is given.*plan with --start svd"
    ):
        locum.plan(without, remove=0.4, rank=2)
    assert locum.plan(without, remove=0.4, rank=2, start="svd").needs == ()
    assert set(GRAMS[:1]) <= set(
        locum.calibrate(checkpoint, out=tmp_path / "one", gram=False, also=GRAMS[0], **given).names
    )


def test_statistics_that_neither_memory_nor_disk_can_hold_are_refused_before_the_model_is_loaded(
    checkpoint, words, statistics_file, tmp_path, monkeypatch
):
    statistics = locum.load_statistics(statistics_file)
    size, grams = nbytes(statistics.shape, statistics.names), nbytes(statistics.shape, ("input_gram", "hidden_gram"))
    assert size == sum(t[0].nbytes for named in statistics.layers.values() for t in named.values())
    monkeypatch.setattr("locum.stages.calibration.open_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=grams))
    monkeypatch.setattr("locum.stages.calibration.free_space", lambda _: 2 * grams - 1)
    for line in (("calibrate", checkpoint), ("search", checkpoint), ("compress", checkpoint, "--remove", 0.4)):
        result = command(*line, "--data", words, "--tokens", 512, "--length", 64, "--out", tmp_path / "out")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert (
            "on the disk of" in result.stderr and "leave them out" in result.stderr and "--start svd" in result.stderr
        )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2 * (size - grams) - 1))
    result = command(
        "calibrate", checkpoint, "--data", words, "--tokens", 512, "--length", 64, "--out", tmp_path / "out"
    )
    assert result.exit_code == 2 and "GiB of memory" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_grams_that_memory_cannot_hold_are_added_up_on_disk_and_are_the_same(
    checkpoint, words, statistics_file, tmp_path, monkeypatch
):
    line = ("calibrate", checkpoint, "--data", f"a={words}", "--data", f"b={words}", "--tokens", 1024, "--length", 64)
    assert command(*line, "--out", tmp_path / "memory").exit_code == 0
    statistics = locum.load_statistics(tmp_path / "memory")
    grams = nbytes(statistics.shape, ("input_gram", "hidden_gram"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=4 * grams - 1))
    made, begin = [], Stack.__init__
    monkeypatch.setattr(Stack, "__init__", lambda self, *given: made.append(self) or begin(self, *given))
    assert command(*line, "--out", tmp_path / "disk").exit_code == 0
    assert len(made) == 2 * len(statistics.layers)
    on_disk = locum.load_statistics(tmp_path / "disk")
    for layer, named in statistics.layers.items():
        assert set(on_disk.layers[layer]) == set(named)
        assert all(torch.equal(on_disk.layers[layer][name], tensor) for name, tensor in named.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]
