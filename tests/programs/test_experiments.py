"""The programs that compare trained models, on a tiny one: what their rows and tables rest on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import locum
from benchmarks.experiments import (
    catalogue,
    compressed_experts,
    equal_bytes,
    experiment,
    fewer_experts,
    moe_i2,
    recovery,
)
from locum.checkpoints.skeleton import read_shape
from making.broken import change_weights
from making.checkpoints import write_checkpoint, write_text

EXPERIMENTS = {
    "LightMoE": (recovery, {"fraction": 0.3}),
    "LoRA, uncompressed": (recovery, {"fraction": 0.3}),
    "whitened SVD alone": (moe_i2, {"fraction": 0.5}),
    "full k": (compressed_experts, {"setting": "all"}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_checkpoint(folder / "model"), write_text(folder / "a.txt", 30_000)


@pytest.fixture
def on_tiny(tiny, tmp_path, monkeypatch):
    """The experiments on a tiny model, with a cache of their own."""
    for module in (experiment, moe_i2, compressed_experts):
        for name, value in (("MODEL", tiny[0]), ("reference_data", lambda: [f"words={tiny[1]}"]), ("CALIBRATED", 1024)):
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(experiment, "LENGTH", 64)
    monkeypatch.setattr(experiment, "MEASURED", {"validation": 256, "test": 256})
    monkeypatch.setattr(experiment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(recovery, "LIGHTMOE_RANK", 2)
    monkeypatch.setattr(recovery, "RANKS", range(2, 4))
    cached = (experiment.statistics, recovery.plan_for, moe_i2.plan_for, moe_i2.searched, compressed_experts.plan_for)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_intervals_before_and_after_training_are_of_one_kind(name, tiny, on_tiny):
    module, setting = EXPERIMENTS[name]
    rows = module.run(name, seed=0, split="test", steps=1, **setting)
    models = {row["model"] for row in rows} - {"original"}
    assert models == {name, f"{name} before"}
    first, *others = [row["provenance"]["evaluation"] for row in rows]
    assert first["resamples"] == 1000 and others == [first] * len(others)
    made, shape = rows[0]["provenance"], read_shape(tiny[0])
    assert made["bytes"] == made["parameters"] * 4  # float32 in the files
    whole = name in ("LoRA, uncompressed", "full k")
    assert (made["parameters"] == shape.parameters) == whole
    table = module.table(rows)
    assert f"| {name} |" in table and (f"| original | {shape.parameters:,} |" in table) == (
        name == "LoRA, uncompressed"
    )


def test_statistics_in_the_cache_answer_the_whole_question(tiny, on_tiny, tmp_path, monkeypatch):
    made = []

    def make(model, data, out, **asked):
        made.append(asked)
        Path(out).write_text("made")

    def kept(**asked) -> Path:
        return experiment.made_once("name", make, **asked)

    first = kept(tokens=1)
    assert kept(tokens=1) == first and made == [{"tokens": 1}]
    others = [kept(tokens=2)]
    another = Path(shutil.copytree(tiny[0], tmp_path / "another"))
    change_weights(another, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    monkeypatch.setattr(experiment, "MODEL", another)
    others.append(kept(tokens=1))
    monkeypatch.setattr(experiment, "reference_data", lambda: [f"words={write_text(tmp_path / 'b.txt', 500, seed=7)}"])
    others.append(kept(tokens=1))
    package = shutil.copytree(Path(locum.__file__).parent / "stats", tmp_path / "locum" / "stats")
    monkeypatch.setattr(locum, "__file__", str(tmp_path / "locum" / "__init__.py"))
    others.append(kept(tokens=1))
    (package / "sums.py").write_text("# changed")
    others.append(kept(tokens=1))
    assert len({first, *others}) == 6 and len(made) == 6


@pytest.mark.journeys
def test_every_way_to_make_experts_small_has_equal_bytes(tiny, tmp_path, monkeypatch):
    words = [
        f"{name}={write_text(tmp_path / f'{name}.txt', 60_000, seed=i)}" for i, name in enumerate(("code", "math"))
    ]
    monkeypatch.setattr(experiment, "MODEL", tiny[0])
    monkeypatch.setattr(experiment, "reference_data", lambda: words)
    monkeypatch.setattr(experiment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(equal_bytes, "file_named", lambda name: tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(equal_bytes, "MEASURED", {"validation": 512, "test": 512})
    searched = (("tokens", 1024), ("sample", 128), ("price", "noise"))
    tried = equal_bytes.Subject("tiny", Path(tiny[0]), tuple(words), torch.float32, searched)
    shape = read_shape(tiny[0])
    names = ["pruned, REAP", equal_bytes.RANDOM, "low rank", *equal_bytes.CHOOSES]
    monkeypatch.setattr(equal_bytes, "METHODS", {name: equal_bytes.METHODS[name] for name in names})
    monkeypatch.setattr(equal_bytes, "SIZES", (2.5,))
    monkeypatch.setattr(equal_bytes, "SEEDS", (0,))
    monkeypatch.setattr(equal_bytes, "RATES", (1e-3,))
    monkeypatch.setattr(equal_bytes, "STEPS", 1)
    for _ in range(2):  # nothing is measured twice
        for phase in equal_bytes.PHASES.values():
            phase(tried, (0, 1))
    for phase, kinds in (("selection", 1), ("test", 2), ("rates", 1), ("recovered", 2)):
        rows = experiment.read(equal_bytes.file_of(phase))
        made = [row for row in rows if "value" in row]
        assert {row["bytes"] <= tried.bytes_for(2.5) for row in made} == {True}
        jobs = {equal_bytes.key(row) for row in made}
        assert len(made) == len(jobs) * kinds * 2  # loss and KL
        selected = {"pruned, REAP", "low rank"} if phase == "selection" else set(names)
        assert {method for _, method, *_ in jobs} == selected
    assert tried.bytes_for(2.5) == shape.bytes - shape.bytes_of_experts + int(2.5 * shape.expert_parameters / 8)
    made = [row for row in experiment.read(equal_bytes.file_of("test")) if row["domains"] == "seen"]
    kl = {row["method"]: row["value"] for row in made if row["metric"] == "kl"}
    assert len(set(kl.values())) == len(names)  # costs of others or of chance give other plans
    bits = {row["method"]: row["bits"] for row in made}
    assert bits["pruned, REAP"] == bits[equal_bytes.RANDOM] and bits[equal_bytes.AUTO] == "own"
    assert equal_bytes.best("selection", tried, "bits", method="pruned, REAP") == [bits["pruned, REAP"]]
    lines = equal_bytes.table(tried).splitlines()[2:]
    assert len(lines) == 2 * len(names) and lines[0].startswith("| 2.5 | pruned, REAP | ")
    (refused,) = equal_bytes.measure(tried, "low rank", 0.01, "2", 0, "test")
    assert "out of reach" in refused["refused"]


@pytest.mark.journeys
def test_the_page_of_the_catalogue_is_made_from_a_comparison(tiny, tmp_path, monkeypatch):
    words = [
        f"{name}={write_text(tmp_path / f'{name}.txt', 60_000, seed=i)}"
        for i, name in enumerate(("a", "math", "plays"))
    ]
    asked = catalogue.ASKED | {"seeds": 2, "tokens": 1024, "length": 64, "measured": 1024}
    tried = dataclasses.replace(equal_bytes.subject("reference"), folder=tiny[0], data=tuple(words))
    monkeypatch.setattr(catalogue, "subject", lambda _: tried)
    monkeypatch.setattr(catalogue, "ASKED", asked)
    monkeypatch.setattr(catalogue, "METHODS", {"reference": "mone,naee:most=0.5:limit=1"})
    monkeypatch.setattr(catalogue, "RESULTS", tmp_path)
    monkeypatch.setattr(catalogue, "PAGES", tmp_path)
    (tmp_path / "catalogue.md").write_text("# Words by hand\n\n## All of them\n\nold")
    monkeypatch.setattr(sys, "argv", ["catalogue", "run", "--out", str(tmp_path / "out")])
    catalogue.main()
    page, picture = (tmp_path / "catalogue.md").read_text(), (tmp_path / "catalogue.svg").read_text()
    assert page.startswith("# Words by hand\n\n## All of them\n\nAt 25% of") and "old" not in page
    found = json.loads((tmp_path / "catalogue.json").read_text())
    assert found["asked"]["leave_out"] == "math,plays" and [group["remove"] for group in found["groups"]] == [0.25, 0.5]
    rows = [row for group in found["groups"] for row in group["rows"]]
    assert [row["name"] for row in rows].count("mone") == 2
    for row in rows:
        assert f"| {row['name']} | {row['loss_delta'][0]:.3f} (" in page and f"{row['seen'][0]:.3f} (" in page
    assert page.count("naee:most=0.5:limit=1 was refused: ") == 2
    ElementTree.fromstring(picture)
    assert picture.count("<circle") == 2 * len(rows)


@pytest.mark.journeys
def test_experts_per_token_are_counted_where_the_loss_is_measured(tiny, tmp_path, monkeypatch, capsys):
    for module in (fewer_experts, experiment):
        monkeypatch.setattr(module, "MODEL", tiny[0])
        monkeypatch.setattr(module, "reference_data", lambda: [f"words={tiny[1]}"])
    for name, value in (("COUNTED", 1024), ("LENGTH", 64), ("MEASURED", {"validation": 512, "test": 512})):
        monkeypatch.setattr(fewer_experts, name, value)
    monkeypatch.setattr(experiment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fewer_experts, "file_of", lambda split: tmp_path / f"{split}.jsonl")
    monkeypatch.setattr(fewer_experts, "NUMBERS", {"top-k": (1,), "top-p": (1.5,), "skipping": (1.5,)})
    for split in ("validation", "test", "test"):  # nothing is measured twice
        fewer_experts.run(split)
    chosen, rows = experiment.read(tmp_path / "validation.jsonl"), experiment.read(tmp_path / "test.jsonl")
    losses = [row for row in chosen if row["metric"] == "loss" and row["rule"] == "top-p"]
    assert len(losses) == 4
    best = min(losses, key=lambda row: row["value"])["options"]
    mine = [row for row in rows if (row["rule"], row["metric"]) == ("top-p", "loss_delta")]
    assert [row["seed"] for row in mine] == [0, 1, 2] and all(row["options"] == best for row in mine)
    assert all(1.3 < row["counted"] < 1.7 for row in mine)
    assert [row["counted"] for row in rows if row["rule"] == "top-k" and row["metric"] == "loss_delta"] == [1.0]
    assert "| 1.5 |  | 1." in fewer_experts.table(rows) and "| 1 | 1.00: " in fewer_experts.table(rows)


def test_bits_that_a_size_leaves_room_for():
    assert equal_bytes.bits_for("full", 4.5) == ["4"] and equal_bytes.bits_for("full", 2.5) == []
    assert equal_bytes.bits_for("low rank", 2.5) == ["8", "4", "3", "2"]
    assert equal_bytes.bits_for("constants", 4.5) == ["16", "8"] and equal_bytes.bits_for(equal_bytes.AUTO, 4.5) == [
        "own"
    ]
