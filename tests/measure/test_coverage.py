"""Which experts calibration saw, as `calibrate` reports it: against planted counts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import locum
from locum.cli.results import show_statistics
from locum.stages.calibration import coverage
from making.checkpoints import locum as command


@pytest.fixture
def observed(statistics_file):
    """Statistics of two domains in which one expert of the second layer saw nothing, and two saw 3 of the 4 tokens that are few."""
    statistics = locum.load_statistics(statistics_file)
    one, two = (layer.name for layer in statistics.shape.layers)
    counts_E = torch.tensor([9, 3, 0, 40, 4, 3, 8, 7], dtype=torch.float64)
    layers = {one: dict(statistics.layers[one]), two: dict(statistics.layers[two])}
    layers[one]["count"], layers[two]["count"] = torch.full((1, 8), 20.0).double(), counts_E[None]
    return dataclasses.replace(statistics, layers=layers)


def test_who_saw_nothing_or_little_is_named(observed, capsys):
    one, two = (layer.name for layer in observed.shape.layers)
    assert observed.shape.layers[0].hidden_size == 32  # so few is fewer than 4
    found = coverage(observed)
    assert found["tokens_per_expert"] == {one: [20] * 8, two: [9, 3, 0, 40, 4, 3, 8, 7]}
    assert (found["never"], found["few"], found["few_is_below"]) == ({two: [2]}, {two: [1, 5]}, 4)
    show_statistics(observed, False)
    said = " ".join(capsys.readouterr().out.split())
    assert "of 16 experts half saw 20 tokens or more, 1 none and 2 fewer than 4" in said and two in said
    show_statistics(observed, True)
    assert json.loads(capsys.readouterr().out)["few"] == {two: [1, 5]}


def test_statistics_without_counts_say_nothing_of_it(observed, capsys):
    without = {name: {k: v for k, v in layer.items() if k != "count"} for name, layer in observed.layers.items()}
    assert coverage(dataclasses.replace(observed, layers=without)) == {}
    show_statistics(dataclasses.replace(observed, layers=without), False)
    assert "experts" not in capsys.readouterr().out


def test_the_command_says_so(checkpoint, words, tmp_path):
    given = ("--data", words, "--tokens", 256, "--length", 64, "--out", tmp_path / "s", "--no-gram", "--json")
    said = json.loads(command("calibrate", checkpoint, *given).stdout)
    top_k = locum.read_shape(checkpoint).layers[0].top_k
    assert {sum(counts) for counts in said["tokens_per_expert"].values()} == {said["tokens"] * top_k}
