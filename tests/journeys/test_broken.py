"""What is broken on purpose is refused by every loader with one message. vLLM's: tests/engines/test_vllm.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.load import load_model
from locum.errors import CheckpointError
from making.broken import DAMAGES, change_weights, truncated
from making.checkpoints import locum as command


@pytest.fixture
def broken(request, small, tmp_path) -> tuple[Path, list[str]]:
    folder = Path(shutil.copytree(small, tmp_path / "broken"))
    return folder, DAMAGES[request.param](folder)


@pytest.mark.parametrize("broken", DAMAGES, indirect=True)
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_model], ids=["transformers", "locum"])
def test_containers(load, broken):
    folder, words = broken
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert any(word in str(caught.value) for word in ("fetch", "install", "restore"))


@pytest.mark.parametrize("broken", DAMAGES, indirect=True)
@pytest.mark.parametrize("to", ["stock", "gguf"])
def test_exporting_containers(to, broken, tmp_path):
    folder, _ = broken
    result = command("export", folder, "--to", to, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def without_an_expert(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.0.up_proj.weight"))


def of_another_shape(folder: Path) -> None:
    name = "model.layers.1.mlp.gate.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


@pytest.mark.parametrize("damage", [without_an_expert, of_another_shape, truncated], ids=lambda damage: damage.__name__)
def test_converting_a_stock_folder(damage, pruned, tmp_path):
    """The converter itself would write a file that llama.cpp cannot read; it is not even started."""
    folder = Path(shutil.copytree(pruned, tmp_path / "broken"))
    damage(folder)
    with pytest.raises(CheckpointError, match="fetch it again"):
        locum.export(folder, to="gguf", out=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
