"""--dry-run: what a stage would take, and nothing else; disks that are too small are refused before any work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

import locum
from locum.checkpoints.beginning import begin_model
from locum.checkpoints.load import load_model
from locum.checkpoints.shard_reader import ShardReader
from locum.checkpoints.skeleton import read_shape
from locum.measure import forward_times
from locum.measure.forward_times import ForwardTimes
from locum.stages.estimate import Estimate
from locum.stats.sums import nbytes
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint
from making.tiny_models import tiny_ids

SHORT = ("--tokens", 512, "--length", 64, "--dry-run")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Four decoder layers, alike."""
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)


def test_the_beginning_is_the_first_layers_to_the_bit(deep, monkeypatch):
    monkeypatch.setattr("locum.checkpoints.on_call.LARGE", 1)  # what a streamed model has only while it is called
    begun, whole = begin_model(deep), load_model(deep)
    assert (len(begun.layers), begun.of) == (1, 4)
    del whole.model.layers[1:]
    with torch.no_grad():
        assert torch.equal(begun.model(tiny_ids()).logits, whole(tiny_ids()).logits)


def test_what_is_missing_of_it_is_counted(deep):
    begun = begin_model(deep)
    there = sum(tensor.nbytes for tensor in begun.model.parameters())
    assert there + begun.missing_bytes == sum(tensor.nbytes for tensor in load_model(deep).parameters())


class Clock:
    """Time that passes when a module says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Working(nn.Module):
    def __init__(self, clock: Clock, seconds: float, *inside: nn.Module):
        super().__init__()
        self.clock, self.seconds, self.inside = clock, seconds, nn.ModuleList(inside)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.clock.now += self.seconds
        for module in self.inside:
            x = module(x)
        return x


def test_more_layers_take_as_much_more_time_as_the_last_one_took(monkeypatch):
    monkeypatch.setattr(forward_times, "time", clock := Clock())
    model = Working(clock, 1.0, Working(clock, 2.0), Working(clock, 4.0))
    with ForwardTimes(model, list(model.inside)) as times:
        model(torch.ones(1))
    assert (times.of_all(7.0, 2), times.of_all(7.0, 5)) == (7.0, 7.0 + 3 * 4.0)
    assert times.of_all(70.0, 5) == 10 * 19.0  # what takes ten times as long as a forward pass
    assert not model._forward_hooks and not model.inside[1]._forward_pre_hooks


def test_a_body_called_apart_and_its_head_are_one_pass(monkeypatch):
    monkeypatch.setattr(forward_times, "time", clock := Clock())
    model = Working(clock, 1.0)
    model.base_model = Working(clock, 0.0, Working(clock, 2.0))
    with ForwardTimes(model, list(model.base_model.inside)) as times:
        model.base_model(torch.ones(1))
        model(torch.ones(1))  # the head, for two stretches
        model(torch.ones(1))
    assert times.of_all(4.0, 3) == 4.0 + 2 * 2.0


def checked(estimate, stage):
    assert isinstance(estimate, Estimate) and estimate.stage == stage
    for each in (estimate, *estimate.parts):
        assert each.seconds > 0 and each.memory_bytes > 2**20 and each.read_bytes >= 0 and each.written_bytes >= 0
        assert each.free_memory_bytes > 0 and each.measured
    return estimate


def test_calibrate_reads_the_weights_once_or_for_every_list_of_batches(deep, words, tmp_path, monkeypatch):
    monkeypatch.setattr("locum.stages.dry_run.HELD", 1)  # a batch at a time
    asked = {"data": [str(words)], "tokens": 512, "length": 64, "batch_size": 4, "out": tmp_path / "out"}
    made = [locum.calibrate(deep, stream=stream, dry_run=True, **asked) for stream in (False, True)]
    said, streamed = (checked(each, "calibrate") for each in made)
    shape = read_shape(deep)
    assert (said.read_bytes, streamed.read_bytes) == (shape.model.bytes, 2 * shape.model.bytes)  # two batches
    made = locum.calibrate(deep, **asked)
    assert said.written_bytes == 2 * nbytes(shape, made.names) and said.free_disk_bytes > 0
    assert (tmp_path / "out").stat().st_size < said.written_bytes


def test_apply_knows_what_it_writes_and_reads(checkpoint, plan_file, statistics_file, tmp_path, monkeypatch):
    read, fill = [], ShardReader._fill
    monkeypatch.setattr(
        ShardReader,
        "_fill",
        lambda reader, stream, buffer, file: read.append(len(buffer)) or fill(reader, stream, buffer, file),
    )
    pruning = tmp_path / "pruning.json"
    locum.plan([statistics_file], method="prune", remove=0.25, out=pruning)
    for plan, exact in ((pruning, True), (plan_file, False)):
        out = tmp_path / "small"
        said = checked(locum.apply(checkpoint, plan=plan, out=out, dry_run=True), "apply")
        assert not out.exists()
        read.clear()
        made = locum.apply(checkpoint, plan=plan, out=out, force=True)
        size = sum(file.stat().st_size for file in made.iterdir())
        assert size <= said.written_bytes <= size + 2**21
        assert sum(read) == said.read_bytes if exact else sum(read) == pytest.approx(said.read_bytes, rel=0.2)
        shutil.rmtree(out)


def test_eval_reads_both_models(checkpoint, small, words):
    asked = {"data": [str(words)], "split": "all", "tokens": 1000, "length": 64, "dry_run": True}
    alone = checked(locum.evaluate(checkpoint, **asked), "eval")
    both = checked(locum.evaluate(small, against=checkpoint, **asked), "eval")
    assert both.read_bytes == alone.read_bytes + read_shape(small).model.bytes and both.free_disk_bytes is None
    said = command("eval", checkpoint, "--tasks", "x", "--data", words, "--dry-run")
    assert said.exit_code == 2 and "--dry-run measures passes over text" in said.stderr


def test_search_is_a_calibration_and_what_it_tries(checkpoint, words, tmp_path):
    few = {"sample": 128, "generations": 2, "population": 4, "pruned": 0.25}
    asked = {"data": [str(words)], "tokens": 512, "length": 64, "out": tmp_path / "found", "dry_run": True}
    said = checked(locum.search(checkpoint, **asked, **few), "search")
    assert [part.stage for part in said.parts] == ["calibrate", "try removals"]
    assert said.seconds == sum(part.seconds for part in said.parts) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "how",
    [
        "--method lightmoe --rank 2 --remove 0.4",
        pytest.param(
            "--method moe-i2 --remove 0.5 --sample 128 --generations 2 --population 4", marks=pytest.mark.journeys
        ),
        pytest.param("--method auto --remove 0.5 --sample 128", marks=pytest.mark.journeys),
    ],
)
def test_compress_is_all_of_it(checkpoint, words, tmp_path, how):
    said = command("compress", checkpoint, "--data", words, *SHORT, *how.split(), "--out", tmp_path / "small", "--json")
    assert said.exit_code == 0, said.output
    made = json.loads(said.stdout)
    first = ["calibrate"] if "lightmoe" in how else ["search"]
    assert [part["stage"] for part in made["parts"]] == [*first, *["check"] * ("auto" in how), "apply"]
    assert all(part["seconds"] > 0 for part in made["parts"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["prune", "lightmoe", "mone"])
def test_what_a_quantiser_reads_is_estimated_too(checkpoint, words, tmp_path, method):
    asked = {"data": [str(words)], "tokens": 512, "length": 64, "remove": 0.25, "bits": "4", "quantiser": "gptq"}
    said = locum.compress(checkpoint, method=method, out=tmp_path / "small", dry_run=True, **asked)
    assert checked(said, "compress").parts[-1].stage == "apply"
    assert not list(tmp_path.iterdir())


def test_people_see_a_table_and_nothing_is_touched(checkpoint, words, tmp_path):
    out = tmp_path / "s"
    (tmp_path / ".s.partial").write_bytes(b"what an interrupted run left")
    before = tree(tmp_path)
    said = command("calibrate", checkpoint, "--data", words, *SHORT, "--out", out)
    assert said.exit_code == 0, said.output
    assert "measured on" in said.stdout and "one decoder layer" in said.stdout and "nothing was written" in said.stdout
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "line",
    [
        "calibrate {model} --data {data}",
        "search {model} --data {data}",
        "compress {model} --data {data} --method prune --remove 0.5 --recover lora",
        "eval {model} --data {data}",
    ],
)
@pytest.mark.parametrize("dry", ["", " --dry-run"])
def test_a_disk_that_is_too_small_is_refused_early(checkpoint, words, tmp_path, monkeypatch, line, dry):
    monkeypatch.setattr("locum.files.free_space", lambda path: 1000)
    said = command(line.format(model=checkpoint, data=words) + f" --out {tmp_path / 'out'}" + dry)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1
    assert "no space left for" in said.stderr and "1000 B are free there" in said.stderr
    assert not list(tmp_path.iterdir())
