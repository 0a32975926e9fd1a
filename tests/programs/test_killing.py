"""`make kill-test`: trials come again from their number, what may differ is named, and what is planted is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuzzing.answers import TIME
from killing.campaign import Trial
from killing.comparison import LEFT_OUT, compare
from killing.stages import STAGES
from locum.cli import cli

TESTS = Path(__file__).parents[1]
NAMES = list(STAGES)


def test_a_trial_comes_again_from_its_number():
    assert [Trial.draw(3, n, NAMES) for n in range(50)] == [Trial.draw(3, n, NAMES) for n in range(50)]
    trials = [Trial.draw(0, n, NAMES) for n in range(400)]
    assert {trial.stage.name for trial in trials} == {*STAGES}
    assert {(trial.force, trial.changed, len(trial.moments)) for trial in trials} == {
        (force, changed, kills) for force in (False, True) for changed in (False, True) for kills in (1, 2)
    }
    assert all(0 <= share < 1 for trial in trials for share, _ in trial.moments)


def test_every_stage_that_goes_on_is_killed():
    killed = {stage.line.split()[0] for stage in STAGES.values()}
    assert {"calibrate", "search", "plan", "apply", "compress", "recover", "eval", "report", "export"} == killed
    assert killed <= {*cli.commands}


@pytest.fixture
def outputs(small, tmp_path):
    """Two copies of one output that were made at other times."""
    for name in ("one", "two"):
        shutil.copytree(small, tmp_path / name)
    for file in ("locum.json", "README.md", "plan.json"):
        text = (tmp_path / "two" / file).read_text()
        (tmp_path / "two" / file).write_text(TIME.sub("2031-01-01T00:00:00Z", text))
    return tmp_path / "one", tmp_path / "two"


def test_when_it_was_made_may_differ(outputs):
    found = compare(*outputs)
    assert found.wrong == [] and found.left_out == {"time"} <= {*LEFT_OUT}
    for folder, spent in zip(outputs, (1.5, 2), strict=True):  # as a card tells of a training
        with (folder / "README.md").open("a") as card:
            card.write(rf"- recovery: \{{'seconds': {spent}, 'peak\_bytes': {spent}, 'steps': 12\}}")
    found = compare(*outputs)
    assert found.wrong == [] and {"seconds", "peak_bytes"} <= found.left_out


def number_in_the_plan(folder):
    plan = json.loads((folder / "plan.json").read_text())
    plan["provenance"]["seed"] = 77
    (folder / "plan.json").write_text(json.dumps(plan))


def byte_of_the_weights(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


SPOILED = {
    "model.safetensors tensor": byte_of_the_weights,
    "plan.json .provenance.seed": number_in_the_plan,
    "README.md line": lambda folder: (folder / "README.md").write_text((folder / "README.md").read_text() + "more\n"),
    "config.json: absent": lambda folder: (folder / "config.json").unlink(),
    "more.txt: too many": lambda folder: (folder / "more.txt").write_text("x"),
    "model.safetensors": lambda folder: os.truncate(folder / "model.safetensors", 5000),
}


@pytest.mark.parametrize("said", SPOILED)
def test_anything_else_is_wrong(said, outputs):
    SPOILED[said](outputs[0])
    (wrong,) = compare(*outputs).wrong[:1]
    assert wrong.startswith(said)


# A command that writes its output as `whole` would not: half of it, slowly, under its own name.
PLANTED = """
import sys, time
from pathlib import Path
from killing import campaign, stages
from killing.stages import Stage

def make_world(folder):
    folder.mkdir()

def command():
    out = Path(sys.argv[-1])
    if sys.argv[1] == "clean":
        return
    begun = time.process_time()
    for place in {places}:
        with open(place, "w") as file:
            for line in range(4):
                while time.process_time() < begun + 0.05 * line:
                    pass
                print(line, file=file, flush=True)
    if out.name not in {places}:
        Path({places}[-1]).rename(out)

campaign.make_world, campaign.shorten_intervals = make_world, lambda: None
campaign.STAGES["planted"] = Stage("planted", "plan", "", "out.txt")
made = campaign.Campaign(command, Path(sys.argv[1]), 0, ["planted"])
rows = made.run(6)
print(campaign.json.dumps([row["wrong"] for row in rows]))
"""


@pytest.mark.parametrize(
    ("places", "expected"),
    [(["out.txt"], "something wrong can be read"), (["half.txt"], "")],
    ids=["in place", "renamed"],
)
@pytest.mark.journeys
def test_what_is_planted_is_found(places, expected, tmp_path):
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", PLANTED.format(places=places), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    said = str(json.loads(ran.stdout.splitlines()[-1]))
    assert expected in said and bool(expected) == ("wrong" in said), said
