"""States of an interrupted training run: taken whole, refused where something is wrong, set aside where unreadable or of
another run."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from locum.errors import CheckpointError
from locum.training.loop import open_log
from locum.training.states import STATE_FILE, load_state
from making.checkpoints import tree
from making.tiny_models import tiny_model
from making.training import Killed, compressed, light, run

ASKED = {"how": "lora", "steps": 4, "checkpoint_every": 2}


def training(workdir, progress=None, validation=None, **options):
    model = tiny_model("olmoe")
    plan = light(model)
    given = {**ASKED, "workdir": workdir, "progress": progress, **options}
    return run(compressed(model, plan), plan, model, validation, **given)


def kill(step, steps, loss):
    if step == 3:
        raise Killed


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The work folder of a run that was killed after step 3, with the state of step 2. Tests copy it."""
    workdir = tmp_path_factory.mktemp("states") / "work"
    with pytest.raises(Killed):
        training(workdir, kill)
    return workdir


@pytest.fixture
def workdir(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "work")


def change(workdir, notes=None, tensors=None):
    """Write the state again with other notes and tensors."""
    path = workdir / STATE_FILE
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["locum-recovery"])
    held = load_file(path)
    (tensors or (lambda _: None))(held)
    said = (notes or (lambda known: known))(said)
    save_file(held, path, {"locum-recovery": json.dumps(said)})


def without(kind):
    return lambda held: [held.pop(key) for key in list(held) if key.startswith(kind)]


def first(held, kind):
    return next(key for key in sorted(held) if key.startswith(kind))


def of_shape(kind, make):
    def spoil(held):
        key = first(held, kind)
        held[key] = make(held[key])

    return spoil


SPOILED = {
    "another version": (lambda notes: notes | {"version": "99"}, None, "its version is '99', and this Locum reads '3'"),
    "no tensors": (None, lambda held: held.clear(), "is not there and should be"),
    "no parameters": (None, without("parameter|"), "parameter of .* is not there"),
    "one parameter fewer": (None, lambda held: held.pop(first(held, "parameter|")), "parameter of .* is not there"),
    "no moments": (None, without("exp_avg"), "exp_avg.* of .* is not there"),
    "no step counts": (None, without("step|"), "step of .* is not there"),
    "a parameter of another": (None, lambda held: held.update({"parameter|x": torch.zeros(2)}), "should be not there"),
    "another shape": (None, of_shape("parameter|", lambda t: t[..., :1].contiguous()), "and should be"),
    "another type": (None, of_shape("exp_avg_sq|", torch.Tensor.double), "float64 and should be .*float32"),
    "a step beyond the end": (lambda n: n | {"step": 5}, None, "of step 5, and the run has steps 1 to 4"),
    "no step": (lambda n: n | {"step": 0}, None, "of step 0"),
    "a step in words": (lambda n: n | {"step": "2"}, None, "notes are damaged"),
    "half a step": (lambda n: n | {"step": 1.5}, None, "notes are damaged"),
    "no tokens": (lambda n: n | {"tokens": None}, None, "notes are damaged"),
    "validation in words": (lambda n: n | {"validation": ["a"]}, None, "notes are damaged"),
    "no loss": (lambda n: {k: v for k, v in n.items() if k != "loss"}, None, "notes are damaged"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_state_that_is_not_whole_is_refused_and_kept(name, workdir):
    notes, tensors, message = SPOILED[name]
    change(workdir, notes, tensors)
    before = (workdir / STATE_FILE).read_bytes()
    with pytest.raises(CheckpointError, match=rf"state\.safetensors: .*{message}.*--restart") as caught:
        training(workdir)
    assert "\n" not in str(caught.value)
    assert (workdir / STATE_FILE).read_bytes() == before


def test_a_state_that_was_only_written_again_is_taken(workdir):
    change(workdir)
    seen = []
    training(workdir, lambda step, *_: seen.append(step))
    assert seen == [3, 4]


@pytest.mark.parametrize("left", [b"", b"half of it", "cut"])
def test_a_state_that_cannot_be_read_is_set_aside_with_a_word(left, workdir, caplog):
    path = workdir / STATE_FILE
    path.write_bytes(path.read_bytes()[:-9] if left == "cut" else left)
    seen = []
    training(workdir, lambda step, *_: seen.append(step))
    assert seen == [1, 2, 3, 4]
    assert (workdir / f"{STATE_FILE}.aside").is_file()
    assert "cannot be read" in caplog.text and "begins afresh" in caplog.text


def with_identity(**changed):
    return lambda notes: notes | {"identity": notes["identity"] | changed}


OF_ANOTHER = {
    "no version": (lambda n: {k: v for k, v in n.items() if k != "version"}, "its version is None"),
    "a list": (lambda n: [n], "its version is None"),
    "other libraries": (with_identity(versions={"torch": "1.0"}), "versions was {'torch': '1.0'} and is"),
    "another option": (with_identity(seed=7), "seed was 7 and is 0"),
    "other validation data": (with_identity(validation="x"), "validation was 'x' and is None"),  # other losses
}


@pytest.mark.parametrize("name", OF_ANOTHER)
def test_a_state_of_another_run_is_set_aside_whole_with_a_word(name, workdir, caplog):
    notes, said = OF_ANOTHER[name]
    change(workdir, notes)
    before, seen = tree(workdir), []
    training(workdir, lambda step, *_: seen.append(step))
    assert seen == [1, 2, 3, 4]
    assert tree(workdir.with_name("work.aside")) == before and (workdir / STATE_FILE).is_file()
    assert said in caplog.text and "begins afresh" in caplog.text


def test_a_damaged_log_is_gone_on_with_by_the_lines_that_can_be_read(tmp_path):
    log = tmp_path / "log.jsonl"
    good = ['{"event": "start"}', '{"step": 1, "loss": 2.0}', '{"step": 1, "said": "x\ufffd"}']
    lines = [good[0], good[1], good[2].replace("\ufffd", "\xfc"), '{"step": "2"', '{"step": "two"}', '{"step": []}']
    lines += ["[1]", "3", '{"step": 1e999}', '{"step": 3, "loss": 1.0}']
    lines += [
        '{"event": "kept", "kept_step": 2}'
    ]  # said at the end, by a run that was killed while it saved the result
    log.write_bytes("\n".join(lines).encode("latin-1"))
    open_log(log, {"options": {}}, 2, 7)
    *kept, last = log.read_text(encoding="utf-8").splitlines()
    assert kept == good
    assert json.loads(last) == {"event": "resume", "resumed_at": 2, "options": {}, "trainable_parameters": 7}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_no_state(make, tmp_path, caplog):
    make(tmp_path / STATE_FILE)
    assert load_state(tmp_path, {}, restart=False).step == 0
    assert "it is no file" in caplog.text and (tmp_path / f"{STATE_FILE}.aside").exists()
