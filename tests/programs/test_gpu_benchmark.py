"""`make gpu` where there is no GPU: it says so, and its parts run on the CPU at a small size."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.speed import gpu as gpu_program
from benchmarks.speed import gpu_model
from benchmarks.speed import layer as layer_speed
from locum.kernels import choice, grouped
from locum.shapes import LayerShape


@pytest.fixture
def gpu(monkeypatch):
    sizes = {"E": 8, "K": 3, "D": 32, "F": 16, "REPLACED": 5, "RANKS": (8, 16)}
    for name, value in sizes.items():
        monkeypatch.setattr(layer_speed, name, value)
    shape = LayerShape("experts", 8, 3, 32, 16, "router", "softmax", False)
    monkeypatch.setattr(layer_speed, "SHAPE", shape)
    monkeypatch.setattr(gpu_model, "NEW", 3)
    return gpu_program


def run(gpu, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_a_line(gpu, monkeypatch, capsys):
    assert run(gpu, monkeypatch) == 2
    assert capsys.readouterr().err == "no CUDA device: nothing was measured\n"


def test_layers_are_right_and_timed(gpu, monkeypatch, capsys, tmp_path):
    out = tmp_path / "gpu.jsonl"
    arguments = ("--device", "cpu", "--tokens", 1, 9, "--part", "parity", "speed", "memory", "--rounds", 1)
    assert run(gpu, monkeypatch, *arguments, "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    plans = len(gpu.layer_speed.plans())
    parity = [row for row in rows if row["benchmark"] == "gpu_parity"]
    assert len(parity) == 2 * (plans + 2) and len(rows) == len(parity) + 2 * plans
    for row in parity:
        assert row["wrong"] == [] and {"loop", "gathered"} <= set(row["error"])
        assert all(0 < size < row["limit"] for size in row["error"].values())
    assert {"eager", "grouped_mm", "batched_mm", "grouped"} <= set(parity[0]["error"])
    speed = next(row for row in rows if row["benchmark"] == "gpu_speed")
    assert speed["contenders"]["grouped"]["ms"] > 0 and speed["contenders"]["loop"]["reached"] > 0
    shown = capsys.readouterr().out
    assert "## parity" in shown and "| identity, bfloat16 | 9 |" in shown and "| floor |" in shown


def test_a_way_that_is_wrong_is_named_and_fails(gpu, monkeypatch, capsys):
    right = grouped.grouped()
    wrong = right._replace(add=lambda y, x, weight, item, token: right.add(y, x * 1.05, weight, item, token))
    monkeypatch.setitem(choice.PRODUCTS, "grouped", lambda: wrong)
    arguments = ("--device", "cpu", "--tokens", 4, "--part", "parity", "--plan", "identity")
    assert run(gpu, monkeypatch, *arguments) == 1
    assert capsys.readouterr().err == "not within its limit: identity, 4 tokens, bfloat16: grouped\n"
    monkeypatch.setitem(choice.PRODUCTS, "grouped", lambda: right._replace(scatter=lambda y, *rest: y.fill_(torch.nan)))
    assert run(gpu, monkeypatch, *arguments) == 1


@pytest.mark.journeys
def test_containers_in_few_bits_are_right_and_timed(gpu, monkeypatch, capsys, tmp_path):
    out = tmp_path / "gpu.jsonl"
    arguments = ("--device", "cpu", "--tokens", 9, "--part", "bits", "--rounds", 1)
    assert run(gpu, monkeypatch, *arguments, "--format", "int4-g32", "nvfp4", "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    whole = [("identity", "int4-g32"), ("pruned 50%", "int4-g32"), ("lightmoe 50%", "int4-g32"), ("identity", "nvfp4")]
    assert [(row["plan"], row["format"]) for row in rows] == whole
    for row in rows:
        assert row["wrong"] == [] and 0 < row["error"]["loop"] < row["limit"] and row["contenders"]["loop"]["ms"] > 0
    shown = capsys.readouterr().out
    assert "## bits" in shown and "| pruned 50% | int4-g32 | 9 |" in shown


@pytest.mark.journeys
def test_whole_models_answer_the_same(gpu, monkeypatch, tmp_path):
    out = tmp_path / "gpu.jsonl"
    assert run(gpu, monkeypatch, "--device", "cpu", "--part", "model", "--rounds", 1, "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["what"] for row in rows} >= {"original", "lightmoe", "one step of recovery", "calibration's cost"}
    assert all(row["same_greedy_tokens"] for row in rows if "same_greedy_tokens" in row)
