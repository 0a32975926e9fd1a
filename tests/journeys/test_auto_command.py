"""The journey of `compress --method auto`: one command, cut short and gone on with, and streamed as in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.data.tokens import load_tokens
from locum.measure.removals import ModelExplorer, draw_sample
from making.checkpoints import VOCABULARY, tree, write_checkpoint
from making.checkpoints import locum as command

pytestmark = pytest.mark.journeys
SHORT = {"tokens": 1024, "length": 32, "sample": 128}
FLAGS = [word for name, value in SHORT.items() for word in (f"--{name}", value)]
IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return write_checkpoint(tmp_path_factory.mktemp("auto") / "model", **sizes)


@pytest.fixture(scope="module")
def limit(model: Path) -> int:
    """Bytes that leave an original weight of an expert about 2.5 bits."""
    shape = locum.read_shape(model)
    return int(shape.bytes - shape.bytes_of_experts + 2.5 / 8 * shape.expert_parameters)


def test_one_command_makes_a_checkpoint_of_the_size_that_opens_and_says_why(model, words, limit, tmp_path):
    out = tmp_path / "small"
    done = command("compress", model, "--method", "auto", "--data", words, "--fit", limit, *FLAGS, "--out", out)
    assert done.exit_code == 0, done.output
    one = locum.read_shape(model).bytes_of_expert(locum.read_shape(model).layers[0])
    assert limit - one < locum.inspect(out)["bytes"] <= limit
    with torch.no_grad():
        assert load_model(out)(IDS).logits.isfinite().all()
    said = locum.load_plan(out / "plan.json").provenance["auto"]
    assert said["predicted_kl"] > 0 and all(len(lines) == 8 for lines in said["experts"].values())
    assert said["measured_kl"] <= said["measured_kl_at_first"] and len(said["by_layer"]) == 2
    assert said["measured_kl"] == pytest.approx(kl_between(model, out, words), rel=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def kl_between(model: Path, small: Path, words: Path) -> float:
    """On the sample of the validation text that a plan is checked on."""
    blocks = load_tokens([str(words)], load_tokenizer(model), split="validation", length=32, tokens=1024)
    batch = draw_sample(blocks, SHORT["sample"], 0)
    with torch.no_grad():
        whole_MV, small_MV = (
            load_model(path)(batch.ids_BS).logits[:, :-1][batch.loss_mask_BS[:, 1:]].log_softmax(-1)
            for path in (model, small)
        )
    return float((whole_MV.exp() * (whole_MV - small_MV)).sum(-1).mean())


def test_one_that_is_cut_short_goes_on_and_makes_the_same(model, words, limit, monkeypatch, tmp_path):
    asked = {"method": "auto", "data": str(words), "fit": str(limit), "seed": 5, **SHORT}
    real, calls = ModelExplorer.stand_ins, Counter()

    def counted(self, plans, with_losses):
        calls[run] += 1
        if run == "cut short" and calls[run] > 1:
            raise KeyboardInterrupt
        return real(self, plans, with_losses)

    monkeypatch.setattr(ModelExplorer, "stand_ins", counted)
    run = "cut short"
    with pytest.raises(KeyboardInterrupt):
        locum.compress(model, out=tmp_path / "again", **asked)
    assert not (tmp_path / "again").exists()
    run = "gone on with"
    again = locum.compress(model, out=tmp_path / "again", **asked)
    assert {path.name for path in tmp_path.iterdir()} == {"again"}
    run = "at once"
    whole = locum.compress(model, out=tmp_path / "whole", statistics=tmp_path / "statistics", **asked)
    assert calls["gone on with"] == calls["at once"] - 1
    left, right = tree(again), tree(whole)
    assert left["model.safetensors"] == right["model.safetensors"]
    assert locum.load_plan(again / "plan.json").id == locum.load_plan(whole / "plan.json").id


@pytest.mark.parametrize("price", ["candidates", "output"])
def test_streamed_it_finds_what_it_finds_in_memory(model, words, limit, price, tmp_path):
    found = {}
    for stream in (False, True):
        file = tmp_path / f"stream-{stream}"
        asked = {"method": "auto", "price": price, "data": str(words), **SHORT}
        statistics = locum.search(model, out=file, stream=stream, **asked)
        plan = locum.plan([statistics], method="auto", fit=str(limit))
        found[stream] = plan, [dict(statistics.layer(x.name)) for x in statistics.shape.layers]
    (plan, layers), (streamed_plan, streamed_layers) = found[False], found[True]
    assert plan.layers == streamed_plan.layers
    for here, there in zip(layers, streamed_layers, strict=True):
        assert set(here) == set(there)
        assert all(torch.equal(value, there[name]) for name, value in here.items())
