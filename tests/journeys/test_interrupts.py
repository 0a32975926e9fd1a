"""Ctrl-C and full disks, in every stage: one line, exit code 2, nothing half-written; long stages go on where they were."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import locum
from making.checkpoints import locum as command
from making.checkpoints import tree

CALIBRATE = "calibrate {model} --data {words} --length 32 --batch-size 1 --out out.safetensors"
SEARCH = (
    "search {model} --data {words} --length 64 --tokens 1024 --sample 128 --generations 2 --population 6 --out stats"
)
COMPRESS = "compress {model} --data {words} --length 64 --batch-size 2 --remove 0.4 --rank 2 --recover annealed --recover-steps 12 --out small"
RECOVER = "recover {small} --data {words} --length 64 --batch-size 2 --steps 12 --checkpoint-every 2 --out recovered"
PARTIAL, WORKDIR, KEPT = ".out.safetensors.partial", ".recovered.recover", ".small.statistics.safetensors"
BEGUN, DRAFT = ".small.part-kept", ".small.unrecovered"


@pytest.fixture
def fill(checkpoint, words, statistics_file, plan_file, small, tmp_path, monkeypatch):
    """Arguments of a command line, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    places = {"model": checkpoint, "words": words, "stats": statistics_file, "plan": plan_file, "small": small}
    return lambda line: line.format(**places).split()


# --- a real SIGINT to a real process --------------------------------------------------------------------------------

# The command in a process that stops itself for good where the test wants to interrupt it: in the middle of its work.
# A suite that was started in the background inherits an ignored SIGINT, and its children would too.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
from locum import cli
{patch}
cli.main()
"""
AFTER_BATCHES = """
import locum
calibrate = sys.modules["locum.measure.calibration"]
run, done = calibrate._run_batch, []
def slow(*arguments):
    run(*arguments); done.append(1)
    if len(done) == 60:
        print("ready", flush=True); time.sleep(600)
calibrate._run_batch = slow
"""
IN_SAVING = """
import locum
apply = sys.modules["locum.checkpoints.application"]
def slow(plan, path):
    path.write_text("half"); print("ready", flush=True); time.sleep(600)
apply.save_plan = slow
"""
AFTER_STEPS = """
import locum
train = sys.modules["locum.training.loop"]
step, done = train.Loop.one_step, []
def slow(self, parts):
    step(self, parts); done.append(1)
    if len(done) == 7:
        print("ready", flush=True); time.sleep(600)
train.Loop.one_step = slow
"""
AFTER_ANSWERS = """
import locum
explorer, done = sys.modules["locum.measure.removals"].ModelExplorer, []
real = explorer.output_error
def slow(self, layer, removed_CE):
    done.append(1)
    if len(done) == 3:
        print("ready", flush=True); time.sleep(600)
    return real(self, layer, removed_CE)
explorer.output_error = slow
"""
IN_AN_ENGINE = """
import locum
verify = sys.modules["locum.verification.verify"]
def slow(*arguments):
    print("ready", flush=True); time.sleep(600)
verify.ask = slow
"""
IN_EVALUATION = """
import locum
evaluate = sys.modules["locum.measure.loss"]
def slow(*arguments):
    print("ready", flush=True); time.sleep(600)
evaluate.batch_sums = slow
"""


def interrupted(patch, arguments, sign=signal.SIGINT):
    """Run a command until it says "ready", press Ctrl-C or send a signal, and return what it said and its exit code."""
    code = WAITING.format(patch=patch)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(0.1)
        process.send_signal(sign)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    return said, process.returncode


@pytest.mark.parametrize(
    ("patch", "line", "kept"),
    [
        (AFTER_BATCHES, CALIBRATE, [PARTIAL]),
        (IN_SAVING, "apply {model} --plan {plan} --out small", [BEGUN]),
        (AFTER_STEPS, RECOVER, [WORKDIR]),
        (IN_EVALUATION, "eval {small} --data {words} --out results.jsonl", []),
        (AFTER_ANSWERS, SEARCH, [".stats.answers", ".stats.calibrated"]),
        (AFTER_STEPS, COMPRESS, [KEPT, DRAFT]),
        (IN_AN_ENGINE, "verify {small} --engine transformers", []),
    ],
    ids=["calibrate", "apply", "recover", "eval", "search", "compress", "verify"],
)
@pytest.mark.journeys
def test_ctrl_c(patch, line, kept, fill, tmp_path):
    said, code = interrupted(patch, fill(line))
    name = line.split()[0]
    assert code == 2, said
    assert said.startswith(f"locum {name}: error: interrupted; nothing half-written was kept")
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    if name == "calibrate":
        _goes_on_to_the_same_statistics(fill(line), tmp_path)
    elif name == "recover":
        _goes_on_to_the_same_weights(fill(line), tmp_path)
    elif name == "apply":
        assert command(*fill(line)).exit_code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.journeys
def test_a_polite_signal_is_ctrl_c(sign, fill, tmp_path):
    said, code = interrupted(IN_SAVING, fill("apply {model} --plan {plan} --out small"), sign)
    assert (code, said.count("\n")) == (2, 1) and said.startswith(
        "locum apply: error: interrupted; nothing half-written"
    )
    assert [path.name for path in tmp_path.iterdir()] == [BEGUN]


def _goes_on_to_the_same_statistics(arguments, folder):
    assert locum.load_statistics(folder / PARTIAL).next_block == 50
    whole = locum.calibrate(arguments[1], data=[arguments[3]], length=32, batch_size=1, out=folder / "whole")
    assert command(*arguments).exit_code == 0
    resumed = locum.load_statistics(folder / "out.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["out.safetensors", "whole"]
    assert resumed.tokens == whole.tokens
    for layer, named in whole.layers.items():
        for name, tensor in named.items():
            assert torch.equal(resumed.layers[layer][name], tensor), name
    assert locum.plan(resumed, remove=0.4, rank=2).id == locum.plan(whole, remove=0.4, rank=2).id


def _goes_on_to_the_same_weights(arguments, folder):
    assert command(*arguments).exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["recovered"]
    whole = [*arguments[:-1], str(folder / "whole")]
    assert command(*whole).exit_code == 0
    resumed, uninterrupted = (load_file(folder / name / "model.safetensors") for name in ("recovered", "whole"))
    assert resumed.keys() == uninterrupted.keys()
    for name, tensor in uninterrupted.items():
        assert torch.equal(resumed[name], tensor), name
    log = (folder / "recovered" / "recovery.jsonl").read_text()
    assert '"event": "resume", "resumed_at": 6' in log


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("locum.stages.planning.meet_target", "plan {stats} --remove 0.4 --rank 2 --out plan.json"),
        ("locum.files.os.replace", "plan {stats} --remove 0.4 --rank 2 --out plan.json"),
        ("locum.stages.reporting.make_report", "report {rows} --out report.html"),
        ("locum.files.os.replace", "report {rows} --out report.html"),
        (
            "locum.stages.planning.meet_target",
            "compress {model} --data {words} --length 64 --remove 0.4 --rank 2 --out small",
        ),
        (
            "locum.stages.application.resumable",
            "compress {model} --data {words} --length 64 --remove 0.4 --rank 2 --out small",
        ),
        (
            "locum.stages.recovery.save_checkpoint",
            "recover {small} --data {words} --length 64 --steps 1 --out recovered",
        ),
        ("locum.stages.recovery.recover_model", "recover {small} --data {words} --length 64 --steps 1 --out recovered"),
        ("locum.checkpoints.skeleton.file_headers", "inspect {model}"),
        ("locum.stages.evaluation.write_rows", "eval {small} --data {words} --out results.jsonl"),
        ("locum.demonstration._run", "demo --out demo"),
    ],
)
def test_ctrl_c_in_process(where, line, fill, small, words, tmp_path_factory, tmp_path, monkeypatch):
    if "{rows}" in line:
        rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        locum.evaluate(small, data=str(words), length=64, tokens=256, out=rows)
        line = line.replace("{rows}", str(rows))
    module, _, name = where.rpartition(".")
    target = os if where.endswith("os.replace") else sys.modules[module]

    def press(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "replace" if target is os else name, press)
    result = command(*fill(line))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"locum {line.split()[0]}: error: interrupted; nothing half-written was kept")
    assert result.stderr.count("\n") == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    kept = [KEPT] if line.startswith("compress") else []
    assert left == ([WORKDIR] if where == "locum.stages.recovery.save_checkpoint" else kept)


def test_ctrl_c_before_the_first_state_keeps_nothing(fill, tmp_path, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["locum.training.loop"].Loop, "one_step", press)
    assert command(*fill(RECOVER)).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_recovery_that_was_interrupted_as_something_else_says_so(fill, tmp_path, monkeypatch, caplog):
    step, done = sys.modules["locum.training.loop"].Loop.one_step, []

    def press(self, parts):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        step(self, parts)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["locum.training.loop"].Loop, "one_step", press)
        assert command(*fill(RECOVER)).exit_code == 2
    assert command(*fill(RECOVER), "--seed", 3).exit_code == 0
    assert "interrupted run of something else: seed was 0 and is 3; it was set aside" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"recovered", f"{WORKDIR}.aside"}
    assert command("clean", "recovered").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"recovered"}


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk with so many KiB free and one file on it."""
    mounted = []

    def make(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size + 4}k", "tmpfs", folder], capture_output=True, text=True
        )
        if ran.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {ran.stderr.strip()}")
        mounted.append(folder)
        (folder / "filler").write_bytes(bytes(4096))
        return folder

    try:
        if shutil.which("mount") is None:
            pytest.skip("a small disk cannot be mounted here: there is no mount program")
        yield make
    finally:
        for folder in mounted:
            subprocess.run(["umount", folder], check=False)


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        ("calibrate {model} --data {words} --length 64 --out {disk}/out", (0, 4, 8)),
        ("apply {model} --plan {plan} --out {disk}/out", (0, 8, 100, 160, 180, 192)),
        ("plan {stats} --remove 0.4 --rank 2 --out {disk}/out", (0,)),
        ("recover {small} --data {words} --length 64 --steps 2 --checkpoint-every 1 --out {disk}/out", (0, 100, 200)),
        ("eval {small} --data {words} --out {disk}/out", (0, 4)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_full_disk(line, sizes, fill, disk):
    for size in sizes:
        folder = disk(size)
        result = command(*fill(line.replace("{disk}", str(folder))))
        assert result.exit_code == 2, f"{size} KiB: {tree(folder).keys()}"
        assert "no space left" in result.stderr
        assert "free some" in result.stderr
        assert result.stderr.count("\n") == 1
        kept = {path.name for path in folder.iterdir()} - {"filler"}
        assert kept <= ({".out.recover"} if line.startswith("recover") else set()), f"{size} KiB"
        if kept:
            assert (folder / ".out.recover" / "state.safetensors").is_file()


def test_a_full_disk_keeps_the_old_output(fill, disk, pruned):
    folder = disk(300)
    shutil.copytree(pruned, folder / "out")
    before = tree(folder)
    result = command(*fill(f"apply {{model}} --plan {{plan}} --out {folder / 'out'} --force"))
    assert result.exit_code == 2
    assert "no space left" in result.stderr
    assert tree(folder) == before


def test_an_unwritable_folder(fill, disk):
    folder = disk(400)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for line in ("apply {model} --plan {plan}", "calibrate {model} --data {words}", "recover {small} --data {words}"):
        result = command(*fill(f"{line} --out {folder}/out"))
        assert result.exit_code == 2
        assert f"cannot write {folder}/out: Read-only file system; choose a folder you may write to" in result.stderr


@pytest.mark.journeys
def test_a_process_that_is_killed_leaves_the_old_output(fill, tmp_path, checkpoint):
    """kill -9 cannot be cleaned up after, but what was there must still be there, whole."""
    assert command(*fill("apply {model} --plan {plan} --out small")).exit_code == 0
    before = tree(tmp_path / "small")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            WAITING.format(patch=IN_SAVING),
            *fill("apply {model} --plan {plan} --out small --force"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    assert tree(tmp_path / "small") == before
