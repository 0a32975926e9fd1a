"""Several ranks, started by torchrun, do what one does; where one dies, the others end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import locum
from locum.bundled import MODEL, reference_data

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
    """Batches that no number of ranks divides, three domains, with Grams; and evaluation."""
    one = None
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}.safetensors"
        run(ranks, "calibrate", MODEL, *TEXT, *SHORT, "--out", out)
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


def test_a_rank_that_dies_ends_the_others(tmp_path):
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
    assert not psutil.pid_exists(ranks[0].pid) and not (tmp_path / "out").exists()
