"""Every test runs offline, on one thread (the suite shares its machine), with real tiny models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses too: results are equal to the bit for equal thread counts only
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import locum
from making import checkpoints
from making.tiny_models import tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The suite notes and keeps nothing in the user's cache. What takes long to make is taken from there: the compiled
    products, copied because links are not trusted, and what the benchmarks built."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locum"
    ours = tmp_path_factory.mktemp("cache") / "locum"
    ours.mkdir(0o700)
    for made in users.iterdir() if users.is_dir() else ():
        if made.name == "kernels":
            shutil.copytree(made, ours / made.name)
        elif made.name not in ("places", "statistics"):
            (ours / made.name).symlink_to(made)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(ours.parent))
        yield ours


@pytest.fixture(autouse=True)
def nothing_kept(own_cache):
    """Every test calibrates: the statistics that `compress` kept in another one are gone."""
    shutil.rmtree(own_cache / "statistics", ignore_errors=True)


@pytest.fixture
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny OLMoE checkpoint folder with a tokenizer. Tests only read it."""
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "original")


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A text file. Tests only read it."""
    return checkpoints.write_text(tmp_path_factory.mktemp("data") / "a.txt")


@pytest.fixture(scope="session")
def statistics_file(checkpoint, words, tmp_path_factory):
    """Statistics of `checkpoint` on `words`. Tests only read them."""
    out = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    locum.calibrate(checkpoint, data=[str(words)], tokens=4096, length=64, out=out)
    return out


@pytest.fixture(scope="session")
def plan_file(statistics_file, tmp_path_factory):
    """A LightMoE plan with adapters of rank 2. Tests only read it."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    locum.plan([statistics_file], remove=0.4, rank=2, out=out)
    return out


@pytest.fixture(scope="session")
def small(checkpoint, plan_file, tmp_path_factory):
    """`checkpoint` after `plan_file`. Tests only read it."""
    return locum.apply(checkpoint, plan=plan_file, out=tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="session")
def pruned(checkpoint, statistics_file, tmp_path_factory):
    """`checkpoint` with two experts of every layer dropped: a stock checkpoint. Tests only read it."""
    plan = locum.plan([statistics_file], method="prune", remove=0.25)
    return locum.apply(checkpoint, plan=plan, out=tmp_path_factory.mktemp("pruned") / "pruned")
