"""Adapters, which have no weights of their own but those that were trained: merged, or refused with how to merge them."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import locum
from locum.exports.target import TARGETS
from making.checkpoints import locum as command
from making.tiny_models import tiny_ids

QUICK = {"steps": 2, "length": 32, "batch_size": 2, "learning_rate": 1e-2, "how": "router", "adapter_only": True}


@pytest.fixture(scope="module", params=["pruned", "small", "with vectors"])
def adapter(request: pytest.FixtureRequest, checkpoint: Path, words: Path, tmp_path_factory) -> Path:
    """Routers over a stock checkpoint, over containers that can be stock, and over a policy that cannot."""
    folder = tmp_path_factory.mktemp("adapter")
    if request.param == "with vectors":
        base = locum.apply(checkpoint, plan=locum.plan(checkpoint, method="compressed-experts"), out=folder / "base")
    else:
        base = request.getfixturevalue(request.param)
    how = {"how": "vectors"} if request.param == "with vectors" else {}
    locum.recover(base, data=words, out=folder / "adapter", **{**QUICK, **how})
    return folder / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits


def test_what_is_said_of_an_adapter_writes_it_merged(adapter: Path, tmp_path: Path) -> None:
    """Every form: it works, or what the refusal says first does; and both are the model that the adapter makes."""
    expected = logits(locum.load_model(adapter))
    for form in TARGETS:
        out = tmp_path / form
        said = command("export", adapter, "--to", form, "--out", out)
        if said.exit_code == 0:
            assert form == "stock" and 0.99 < float(re.search(r"([0-9.]+) times", said.output)[1]) < 4
            torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
            continue
        line = " ".join(said.output.split())
        assert "locum plan" not in line and "recover" not in line, line
        if in_python := re.search(r"locum\.load_model\(('.*?')\)\.save_pretrained\(OUT\)", line):
            locum.load_model(ast.literal_eval(in_python[1])).save_pretrained(tmp_path / f"{form}-merged")
            made = locum.load_model(tmp_path / f"{form}-merged")
        else:
            words = shlex.split(re.search(r"first: locum (.*)", line)[1])
            assert command(*words[:-1], tmp_path / f"{form}-merged").exit_code == 0
            made = AutoModelForCausalLM.from_pretrained(tmp_path / f"{form}-merged")
        torch.testing.assert_close(logits(made), expected)
