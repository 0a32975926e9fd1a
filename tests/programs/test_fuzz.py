"""`make fuzz`: inputs come again from their number, damages damage, and what is planted is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from fuzzing.answers import CRASH, ERROR, FAULTS, HANG, MEMORY, OTHER, SAME, TRACEBACK, UNCLEAR
from fuzzing.damages import DAMAGES, NotHere
from fuzzing.inputs import make_input
from fuzzing.kinds import KINDS, OPTIONS, ROUND
from locum.cli import cli
from making.checkpoints import tree

TESTS = Path(__file__).parents[1]
TRIES = 20


@pytest.fixture
def make_place(tmp_path, small, statistics_file, plan_file, words):
    """A function that makes a place like a copy of the world: every file that a kind names has a content of its own."""
    contents = {".safetensors": statistics_file, ".json": plan_file, ".txt": words, ".parquet": words, ".jinja": words}

    def make(name: str) -> Path:
        place = tmp_path / name
        for reading in (reading for readings in KINDS.values() for reading in readings):
            for file in reading.files:
                path = place / file
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = b'{"x": 1, "y": [2, 3]}\n' * 9 if path.suffix == ".jsonl" else None
                source = (
                    small / "config.json" if path.name == "config.json" else contents.get(path.suffix, statistics_file)
                )
                path.write_bytes(rows or source.read_bytes())
        (place / "odd").mkdir()
        (place / "odd" / "nulls.parquet").write_bytes(b"odd")
        return place

    return make


def test_an_input_comes_again_from_its_number(make_place):
    for number in range(0, len(ROUND), 3):
        one, two = make_place(f"one-{number}"), make_place(f"two-{number}")
        assert make_input(3, number, one) == make_input(3, number, two), number
        assert _content(one) == _content(two)


def _content(place: Path) -> dict[str, object]:
    names = (path for path in sorted(place.rglob("*")) if path.is_symlink() or not path.is_fifo())
    return {
        str(p.relative_to(place)): os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in names
    }


def test_inputs_are_of_every_kind_and_command(tmp_path):
    assert {*ROUND} == {*KINDS, OPTIONS}
    first = ROUND.index(OPTIONS)
    made = [make_input(0, first + i * len(ROUND), tmp_path) for i in range(400)]
    assert {one.arguments[0] for one in made} == {*cli.commands}
    assert len({one.arguments for one in made}) > 300


CONTENTS = {reading.content: reading.files[0] for readings in KINDS.values() for reading in readings}


@pytest.mark.parametrize("content", sorted(DAMAGES))
def test_damages_damage(content, make_place, tmp_path):
    """Each damage of a content, drawn often, says what it did and changes the file nearly always."""
    place, file = make_place("place"), CONTENTS.get(content, "plan.json")
    before = (place / file).read_bytes()
    for damage in DAMAGES[content]:
        changed = 0
        for seed in range(TRIES):
            path = place / file
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(before)
            try:
                assert damage(path, Random(seed)), damage.__name__
            except NotHere:
                continue
            changed += path.is_symlink() or not path.is_file() or path.read_bytes() != before
        assert changed > TRIES // 2, damage.__name__


# --- what is planted is found -----------------------------------------------------------------------------------------

# A campaign on a tiny world, with a command that fails in a way of its own for what is in the file that was damaged.
PLANTED = """
import ctypes, json, sys, time
from pathlib import Path
from fuzzing import campaign, inputs, kinds
from fuzzing.process import Limits

ANSWERS = {answers}
LINE = "inspect plan.json"

def make_world(folder):
    folder.mkdir()
    (folder / "plan.json").write_text("undamaged")

def make_input(seed, number, place):
    (place / "plan.json").write_text(ANSWERS[number])
    return inputs.Input(number, "plan", tuple(LINE.split()), LINE, ANSWERS[number])

def command():
    answer = Path(sys.argv[2]).read_text()
    if answer == "traceback":
        raise KeyError("planted")
    if answer == "hog":
        hog = []
        while True:
            hog.append(b"x" * (1 << 26))
    if answer == "greedy":
        bytearray(1 << 50)
    if answer == "hang":
        time.sleep(600)
    if answer == "crash":
        ctypes.string_at(0)
    if answer == "two lines":
        sys.stderr.write("locum: error: one\\nand two\\n")
    if answer == "error":
        sys.stderr.write("locum inspect: error: planted; do something else\\n")
    if answer in ("two lines", "error"):
        sys.exit(2)
    Path("out.json").write_text(json.dumps({{"answer": 2 if answer == "other" else 1, "time": time.time()}}))

campaign.make_world, campaign.make_input = make_world, make_input
made = campaign.Campaign(command, Path(sys.argv[1]), Limits(seconds=6, memory=1 << 30), seed=0, jobs=2)
made.run(0, 4 * len(kinds.ROUND), ["plan"])
with made.answers.open("a") as file:  # killed while it wrote a line
    file.write('{{"number": 9')
rows = made.run(0, {count} * len(kinds.ROUND), ["plan"], resume=True)
assert rows == [json.loads(line) for line in made.answers.read_text().splitlines()]
print(json.dumps(rows))
"""
EXPECTED = {
    "undamaged": SAME,
    "other": OTHER,
    "error": ERROR,
    "two lines": UNCLEAR,
    "traceback": TRACEBACK,
    "crash": CRASH,
    "hog": MEMORY,
    "greedy": MEMORY,
    "hang": HANG,
}


@pytest.mark.journeys
def test_what_is_planted_is_found(tmp_path):
    numbers = [i for i, kind in enumerate(ROUND * len(EXPECTED)) if kind == "plan"]
    answers = dict(zip(numbers, EXPECTED, strict=True))
    code = PLANTED.format(answers=answers, count=len(EXPECTED))
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    rows = {row["damaged"]: row for row in json.loads(ran.stdout.splitlines()[-1])}
    assert {name: row["result"] for name, row in rows.items()} == EXPECTED
    assert {name for name, row in rows.items() if row["fault"]} == {
        n for n, result in EXPECTED.items() if result in FAULTS
    }
    assert rows["traceback"]["said"] == "KeyError: 'planted'" and rows["traceback"]["where"].endswith("in command")
    assert rows["hang"]["where"].endswith("in command") and rows["hang"]["cpu_seconds"] < 2
    assert rows["other"]["differs"] == ["out.json.answer: 1 -> 2"]
    assert tree(tmp_path / "out").keys() == {
        "answers.jsonl",
        "making",
        "making.stderr",
        "making.stdout",
        "making.tmp",
        "world",
        "world/plan.json",
    }
