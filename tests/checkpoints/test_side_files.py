"""What goes along with weights into a new folder, and what does not; and that config.json announces what is there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import locum
from locum.checkpoints.announced import settle_config
from locum.checkpoints.side_files import side_files
from locum.errors import CheckpointError
from making.checkpoints import locum as command

ALONG = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "tokenizer.model",
    "LICENSE.md",
    "NOTICE",
)
STAYS = ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "modeling_x.py", ".secret")


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    for name in (*ALONG, *STAYS):
        (folder / name).write_text(json.dumps({"of": name}))
    return folder


def test_all_that_is_not_weights_goes_along_as_it_is(source, plan_file, words, tmp_path):
    out = locum.apply(source, plan=plan_file, out=tmp_path / "small")
    trained = tmp_path / "trained"
    locum.recover(out, original=source, data=[str(words)], how="lora", steps=1, length=32, batch_size=1, out=trained)
    whole = locum.export(out, to="stock", out=tmp_path / "whole")["out"]
    for folder in (out, trained, Path(whole)):
        assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in ALONG), folder
        assert not any((folder / name).exists() for name in STAYS), folder


def test_a_file_that_did_not_come_along_is_missed(source, plan_file, tmp_path):
    out = locum.apply(source, plan=plan_file, out=tmp_path / "small")
    (out / "processor_config.json").unlink()
    checks = locum.verify(out, engine="llamacpp", long_tokens=0)
    assert [(c.result, "processor_config.json" in c.detail) for c in checks if c.check == "other files"] == [
        ("failed", True)
    ]


def test_an_adapters_config_stays_with_its_weights(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    (folder / "adapter_config.json").write_text("{}")  # with it, transformers would look for the adapter
    assert "adapter_config.json" not in [file.name for file in side_files(folder)]


def test_links_lead_nowhere_out_of_the_folder(source, plan_file, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "USE_POLICY.md").symlink_to(tmp_path / "secret")
    result = command("apply", source, "--plan", plan_file, "--out", tmp_path / "small")
    assert result.exit_code == 2 and "leads out of the checkpoint's folder" in result.stderr
    assert not (tmp_path / "small").exists()
    (source / "USE_POLICY.md").unlink()
    (source / "USE_POLICY.md").symlink_to("LICENSE.md")
    assert "USE_POLICY.md" in [file.name for file in side_files(source)]


def test_the_blobs_of_a_hub_cache_are_its_own(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "abc").write_text("licence")
    (snapshot / "LICENSE").symlink_to(os.path.join("..", "..", "blobs", "abc"))
    assert side_files(snapshot) == [snapshot / "LICENSE"]
    (snapshot / "NOTICE").symlink_to(tmp_path)  # a folder, which is no file of the checkpoint
    (tmp_path / "other").write_text("")
    (snapshot / "README.txt").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"README\.txt leads out of the checkpoint"):
        side_files(snapshot)


# What config.json announces.


@pytest.fixture
def announcing(tmp_path):
    def make(entries: dict, names: list[str]) -> dict:
        (tmp_path / "config.json").write_text(json.dumps(entries))
        save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
        settle_config(tmp_path)
        return json.loads((tmp_path / "config.json").read_text())

    return make


COUNTS = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 2, "num_mtp_modules": 3, "num_hidden_layers": 2}


def test_prediction_layers_that_were_not_written_are_not_announced(announcing):
    plain = ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    none = dict.fromkeys(COUNTS, 0) | {"num_hidden_layers": 2}
    assert announcing(COUNTS, plain) == none
    assert announcing({"text_config": COUNTS, "a": [1]}, plain) == {"text_config": none, "a": [1]}
    for there in (
        "mtp.fc.weight",
        "model.mtp_layers.0.x",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.input_norm.weight",
    ):
        assert announcing(COUNTS, [*plain, there]) == COUNTS, there


def test_code_that_did_not_come_along_is_not_named(announcing, tmp_path):
    entries = {"auto_map": {"AutoConfig": "configuration_x.Config", "AutoModel": "modeling_x.Model"}, "model_type": "x"}
    (tmp_path / "configuration_x.py").write_text("")
    assert announcing(entries, ["a"])["auto_map"] == {"AutoConfig": "configuration_x.Config"}
    (tmp_path / "configuration_x.py").unlink()
    assert announcing(entries, ["a"]) == {"model_type": "x"}


def test_a_checkpoint_with_a_head_that_is_left_out(source, plan_file, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    out = locum.apply(source, plan=plan_file, out=tmp_path / "small")
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any("mtp" in name for name in load_file(out / "model.safetensors"))
