"""`locum clean`: lists what interrupted runs left, removes it for the outputs that are named, and nothing else."""

from __future__ import annotations

import json
import subprocess

import pytest

import locum
from locum.errors import OutputError
from locum.runs import STATES, reserved
from making.checkpoints import locum as command
from making.checkpoints import tree


@pytest.fixture
def left(tmp_path, monkeypatch):
    """What killed runs left of two outputs, beside files of others."""
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f".small.part-{process.pid}").mkdir()
    names = [
        ".small.recover.aside",
        ".small.partial-0-of-2",
        ".small.answers-1-of-2",
        "..small.statistics.safetensors.partial-1-of-2",
        "..small.statistics.safetensors.partial",
        *(f".small.{state}" for state in STATES),
    ]
    for name in [*names, ".stats.st.partial", ".small.lock", "small", ".small.photo", ".profile", ".small.partial.txt"]:
        (tmp_path / name).write_text("12345678")
    return {*names, f".small.part-{process.pid}"}


def test_what_is_left_is_listed_and_stays(left, tmp_path):
    before = tree(tmp_path)
    rows = locum.clean()
    assert {row["path"] for row in rows} == left | {".stats.st.partial"}
    assert {row["output"] for row in rows} == {"small", "stats.st"} and not any(row["removed"] for row in rows)
    assert {row["bytes"] for row in rows} == {0, 8}
    said = command("clean").output
    assert "found .small.recover (8 B)" in said and said.endswith("to remove it: locum clean small stats.st\n")
    assert tree(tmp_path) == before


def test_what_is_left_of_an_output_goes(left, tmp_path):
    rows = json.loads(command("clean small --json").output)
    assert {row["path"] for row in rows} == left and all(row["removed"] for row in rows)
    assert set(tree(tmp_path)) == {".stats.st.partial", "small", ".small.photo", ".profile", ".small.partial.txt"}
    assert command("clean small").output == "nothing was left by interrupted runs\n"


def test_the_only_copy_of_an_output_gets_its_name_back(left, tmp_path):
    (tmp_path / "small").unlink()
    (part,) = tmp_path.glob(".small.part-[0-9]*")
    part.rename(part.with_name(part.name.replace("part", "old")))
    locum.clean("small")
    assert (tmp_path / "small").is_dir()


def test_a_run_that_is_at_work_keeps_what_it_has(left, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with reserved("small"), ThreadPoolExecutor() as pool:
        before = tree(tmp_path)
        with pytest.raises(OutputError, match="another run is writing small"):
            pool.submit(locum.clean, "small").result()
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_a_folders_place_is_no_output(name, left, tmp_path):
    before = tree(tmp_path)
    said = command("clean", "small", name)
    assert said.exit_code == 2 and "no output's name" in said.stderr and said.stderr.count("\n") == 1
    assert tree(tmp_path) == before
