"""The programs that compare trained models, on a tiny one: what their rows and tables rest on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import locum
from benchmarks.experiments import compressed_experts, experiment, moe_i2, recovery
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
