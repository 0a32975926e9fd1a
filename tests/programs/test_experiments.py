"""The programs that compare trained models, on a tiny one: what their rows and tables rest on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import locum
from benchmarks.experiments import compressed_experts, equal_bytes, experiment, fewer_experts, moe_i2, recovery
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
def test_methods_in_few_bits_have_equal_bytes(tiny, tmp_path, monkeypatch):
    words = [
        f"{name}={write_text(tmp_path / f'{name}.txt', 60_000, seed=i)}" for i, name in enumerate(("code", "math"))
    ]
    for module in (equal_bytes, experiment):
        monkeypatch.setattr(module, "MODEL", tiny[0])
        monkeypatch.setattr(module, "reference_data", lambda: words)
    monkeypatch.setattr(experiment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(equal_bytes, "CALIBRATED", 1024)
    monkeypatch.setattr(equal_bytes, "MEASURED", {"validation": 512, "test": 512})
    monkeypatch.setattr(equal_bytes, "file_named", lambda name: tmp_path / f"{name}.jsonl")
    rows = equal_bytes.measure("pruned, REAP", 3.5, "4", 0, "test")
    shape = read_shape(tiny[0])
    assert {row["bytes"] for row in rows} == {rows[0]["bytes"]}
    assert rows[0]["bytes"] <= shape.bytes - shape.bytes_of_experts + 3.5 * shape.expert_parameters / 8
    told = [(row["domains"], row["metric"]) for row in rows]
    assert sorted(told) == [(d, m) for d in ("seen", "unseen") for m in ("kl", "loss_delta")]
    (refused,) = equal_bytes.measure("base + adapter", 0.01, "2", 0, "test")
    assert "out of reach" in refused["refused"]
    losses = {"8": 0.3, "4": 0.1, "3": 0.2}
    tried = [{"method": "pruned, REAP", "size": 2.5, "bits": bits, "metric": "loss_delta"} for bits in losses]
    equal_bytes.write(
        equal_bytes.file_of("validation"), (0, 1), [row | {"value": losses[row["bits"]]} for row in tried]
    )
    assert equal_bytes.chosen("pruned, REAP", 2.5) == equal_bytes.chosen(equal_bytes.RANDOM, 2.5) == ["4"]
    assert equal_bytes.chosen("constants", 2.5) == [] and equal_bytes.chosen("full", 3.0) == ["2"]
    equal_bytes.write(equal_bytes.file_of("test"), (0, 1), rows)
    (line,) = equal_bytes.table(0).splitlines()[2:]
    assert line.startswith("| 3.5 | pruned, REAP | 4 | 1 | ")


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
    assert equal_bytes.bits_for("constants", 4.5) == ["16", "8"]
