"""Several ranks, started by torchrun, do what one does; where one dies, the others end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import locum
from locum.bundled import MODEL, reference_data
from locum.measure.removals import ModelExplorer
from locum.runs import PROGRESS, Work
from making.checkpoints import tree, write_checkpoint, write_text
from making.ranks import killed, on_ranks, stops_in

pytestmark = pytest.mark.journeys
TEXT = [word for source in reference_data()[:3] for word in ("--data", source)]
SHORT = ("--tokens", "4000", "--length", "64", "--batch-size", "3")


def command(ranks, *words):
    start = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    return [sys.executable, *start, "-m", "locum", *map(str, words)]


def run(ranks, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command(ranks, *words), capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_ranks_count_what_one_counts(tmp_path):
    """Batches that no number of ranks divides, three domains, with Grams and a sample; and evaluation."""
    one = None
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}.safetensors"
        run(ranks, "calibrate", MODEL, *TEXT, *SHORT, "--also", "input_sample", "--also", "output_hsic", "--out", out)
        found = locum.load_statistics(out)
        if one is None:
            one = found
            continue
        assert (found.domains, found.tokens, found.origin, found.asked) == (
            one.domains,
            one.tokens,
            one.origin,
            one.asked,
        )
        for layer, named in one.layers.items():
            assert set(found.layers[layer]) == set(named)
            for name, sums in named.items():
                torch.testing.assert_close(
                    found.layers[layer][name], sums, rtol=1e-12, atol=1e-12 * float(sums.abs().max())
                )
    rows = [json.loads(run(n, "eval", MODEL, *TEXT, "--tokens", 2000, "--json")) for n in (1, 2)]
    told = ("model", "metric", "domain", "value", "low", "high", "n")
    assert [[row[key] for key in told] for row in rows[0]] == [[row[key] for key in told] for row in rows[1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{ranks}.safetensors" for ranks in (1, 2, 4)]


def test_what_is_not_shared_the_first_rank_does_alone():
    assert json.loads(run(2, "inspect", MODEL, "--json"))["model_type"] == "olmoe"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint of six layers, its statistics with Gram matrices, text, and a plan whose stand-ins are made from them."""
    folder = tmp_path_factory.mktemp("deep")
    write_checkpoint(folder / "model", num_hidden_layers=6)
    text = write_text(folder / "words.txt")
    locum.calibrate(folder / "model", data=[str(text)], tokens=2048, length=64, out=folder / "stats")
    locum.plan(folder / "stats", remove=0.4, rank=2, start="whitened", out=folder / "plan.json")
    return folder


@pytest.fixture
def words(tmp_path_factory):
    """A folder for what ranks say."""
    return tmp_path_factory.mktemp("words")


def applying(deep, out):
    """Small files, so that there are several, and ranks write into the same ones."""
    return ("apply", deep / "model", "--plan", deep / "plan.json", "--shard-size", "60KB", "--out", out)


def files(folder):
    """The files of a checkpoint, without what says when and by which command they were made."""
    made = tree(folder)
    notes, plan = (json.loads(made.pop(name)) for name in ("locum.json", "plan.json"))
    made.pop("README.md")
    for words in (notes, plan["provenance"]):
        words.pop("time")
        words.pop("command")
    return made, notes, plan


def test_ranks_write_the_files_that_one_writes(deep, words, tmp_path):
    """Layers, and what lies between them, are shared out; two, three and four ranks; a plan that prunes is stock."""
    locum.apply(deep / "model", plan=deep / "plan.json", shard_size="60KB", out=tmp_path / "1")
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 2
    for ranks in (2, 3, 4):
        on_ranks(ranks, words, *applying(deep, tmp_path / f"{ranks}"))
        assert files(tmp_path / f"{ranks}") == files(tmp_path / "1")
    asked = ("compress", deep / "model", "--method", "prune", "--remove", "0.25", "--data", deep / "words.txt")
    for ranks in (1, 2):
        on_ranks(ranks, words, *asked, "--statistics", deep / "stats", "--out", tmp_path / f"pruned-{ranks}")
    assert files(tmp_path / "pruned-1") == files(tmp_path / "pruned-2")
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3", "4", "pruned-1", "pruned-2"}


def test_ranks_compress_from_text_to_files(deep, words, tmp_path):
    """Nothing is there before. The sums of several ranks differ from one's in the last bits, so the plan is compared."""
    asked = ("--remove", "0.4", "--rank", "2", "--data", deep / "words.txt", "--tokens", "2048", "--length", "64")
    for ranks in (1, 2):
        on_ranks(ranks, words, "compress", deep / "model", *asked, "--out", tmp_path / f"{ranks}")
    (one, _, plan), (two, _, other) = (files(tmp_path / f"{ranks}") for ranks in (1, 2))
    assert {name: len(content) for name, content in one.items()} == {
        name: len(content) for name, content in two.items()
    }
    assert plan["layers"] == other["layers"]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_ranks_search_what_one_searches(deep, words, tmp_path):
    """Layers and blocks of them are shared out; what was found is equal to the bit, sums of the calibration nearly so."""
    asked = (
        "--tokens",
        1024,
        "--length",
        64,
        "--batch-size",
        2,
        "--sample",
        128,
        "--population",
        6,
        "--generations",
        2,
    )
    asked = (*asked, "--pruned", 0.3, "--block", 2, "--seed", 3, "--data", deep / "words.txt")
    found = []
    for ranks in (1, 2, 4):
        on_ranks(ranks, words, "search", deep / "model", *asked, "--out", tmp_path / f"{ranks}")
        found.append(locum.load_statistics(tmp_path / f"{ranks}"))
    one = found[0]
    for other in found[1:]:
        assert (other.searched, other.asked, other.origin, other.tokens) == (
            one.searched,
            one.asked,
            one.origin,
            one.tokens,
        )
        for layer, named in one.layers.items():
            for name, sums in named.items():
                if name in ("dropped", "pruned_importance"):
                    assert torch.equal(other.layers[layer][name], sums)
                else:
                    torch.testing.assert_close(other.layers[layer][name], sums, rtol=1e-12, atol=1e-12)
    assert sum(int(named["dropped"].sum()) for named in one.layers.values()) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "4"}


# --- a rank that dies -------------------------------------------------------------------------------------------------


def test_calibration_of_which_a_rank_dies_goes_on(deep, words, tmp_path):
    asked = ("calibrate", deep / "model", "--data", deep / "words.txt", "--length", 32, "--batch-size", 1, "--no-gram")

    def stop():
        stops_in(sys.modules["locum.measure.calibration"], "_run_batch", 60)

    killed(words, 1, stop, *asked, "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial-0-of-2", ".out.partial-1-of-2"}
    assert locum.load_statistics(tmp_path / ".out.partial-1-of-2").next_block == 50
    on_ranks(2, words, *asked, "--out", tmp_path / "out")
    on_ranks(2, words, *asked, "--out", tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    resumed, whole = locum.load_statistics(tmp_path / "out"), locum.load_statistics(tmp_path / "whole")
    assert resumed.tokens == whole.tokens
    for layer, named in whole.layers.items():
        assert all(torch.equal(resumed.layers[layer][name], sums) for name, sums in named.items())


@pytest.mark.parametrize("dies", [0, 1])
def test_applying_of_which_a_rank_dies_goes_on(dies, deep, words, tmp_path):
    """With as many ranks, with another number of them, and alone: in the files that were begun."""
    locum.apply(deep / "model", plan=deep / "plan.json", shard_size="60KB", out=tmp_path / "whole")
    killed(words, dies, lambda: stops_in(Work, "save", 2), *applying(deep, tmp_path / "out"))
    begun = tmp_path / ".out.part-kept"
    assert json.loads((begun / PROGRESS).read_text())["done"] > 0
    for ranks in (1, 2, 3):
        again = shutil.copytree(begun, tmp_path / f".{ranks}.part-kept")
        nodes = {path.name: path.stat().st_ino for path in again.glob("*.safetensors")}
        on_ranks(ranks, words, *applying(deep, tmp_path / f"{ranks}"))
        assert files(tmp_path / f"{ranks}") == files(tmp_path / "whole")
        assert {path.name: path.stat().st_ino for path in (tmp_path / f"{ranks}").glob("*.safetensors")} == nodes
    on_ranks(2, words, *applying(deep, tmp_path / "out"), "--seed", 1)  # which begins afresh
    assert files(tmp_path / "out")[1]["seed"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", "1", "2", "3"}


def test_a_search_of_which_a_rank_dies_goes_on(deep, words, tmp_path):
    asked = ("search", deep / "model", "--data", deep / "words.txt", "--tokens", 1024, "--length", 64, "--sample", 128)
    asked = (*asked, "--population", 6, "--generations", 2)

    def stop():
        sys.modules["locum.measure.remembered"].SAVE_EVERY = 0.0
        stops_in(ModelExplorer, "output_error", 5, after=False)

    killed(words, 1, stop, *asked, "--out", tmp_path / "out")
    assert {".out.calibrated", ".out.answers-1-of-2"} <= {path.name for path in tmp_path.iterdir()}
    on_ranks(2, words, *asked, "--out", tmp_path / "out")
    on_ranks(2, words, *asked, "--out", tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    resumed, whole = locum.load_statistics(tmp_path / "out"), locum.load_statistics(tmp_path / "whole")
    for layer, named in whole.layers.items():
        assert all(torch.equal(resumed.layers[layer][name], sums) for name, sums in named.items())


def test_torchrun_ends_the_others_where_a_rank_dies(tmp_path):
    """They compute, and wait for nobody."""
    words = command(2, "calibrate", MODEL, *TEXT, "--tokens", 400000, "--out", tmp_path / "out")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as started:
        ranks = []
        while len(ranks) < 2 or not any(".partial" in p.name or ".lock" in p.name for p in tmp_path.iterdir()):
            assert started.poll() is None
            time.sleep(0.5)
            ranks = [p for p in psutil.Process(started.pid).children() if "locum" in p.cmdline()]
        time.sleep(2)
        os.kill(ranks[1].pid, signal.SIGKILL)
        begin = time.monotonic()
        _, said = started.communicate(timeout=60)
        assert time.monotonic() - begin < 60 and started.returncode != 0
    assert "SIGKILL" in said or "exitcode: -9" in said or "exitcode  : -9" in said
    assert "another of the 2 ranks or the whole run was ended; nothing half-written was kept" in said
    assert not psutil.pid_exists(ranks[0].pid) and not (tmp_path / "out").exists()
