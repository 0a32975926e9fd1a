"""Folders in which an interrupted run goes on: what was saved stays, what was not goes, another question begins afresh."""

from __future__ import annotations

import errno

import pytest

from locum.errors import OptionError, OutputError
from locum.runs import PROGRESS, asides_of, beside, clear_states, places_of_states, resumable, set_aside
from making.checkpoints import tree

ASKED = {"plan": "a", "seed": 0}


def work_on(out, stop=None, asked=ASKED, error=KeyboardInterrupt):
    """Three files, one a step; ended by an error when `stop` steps are saved and the next one is half done."""
    done = []
    with resumable(out, asked) as work:
        for number in range(work.done + 1, 4):
            (work.folder / f"{number}").write_text("half" if work.done == stop else "whole")
            if work.done == stop:
                raise error()
            work.save(number)
            done.append(number)
        (work.folder / "last").write_text("whole")
    return done


WHOLE = {"out": b"", **{f"out/{name}": b"whole" for name in ("1", "2", "3", "last")}}


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_run_goes_on_after_the_last_step_that_was_saved(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        work_on(tmp_path / "out", stop)
    assert [path.name for path in tmp_path.iterdir()] == [".out.part-kept"]
    assert work_on(tmp_path / "out") == list(range(stop + 1, 4))
    assert tree(tmp_path) == WHOLE


def test_what_was_written_after_it_was_saved_is_not_taken(tmp_path):
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path / "out", ASKED) as work:
        work.save(1)
        (work.folder / "last").write_text("half")
        (work.folder / "folder").mkdir()
        raise KeyboardInterrupt
    with resumable(tmp_path / "out", ASKED) as work:
        assert {path.name for path in work.folder.iterdir()} == {PROGRESS}
    assert tree(tmp_path) == {"out": b""}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OptionError, OSError])
def test_nothing_stays_of_what_was_not_saved(tmp_path, error):
    with pytest.raises(error):
        work_on(tmp_path / "out", 0, error=error)
    assert tree(tmp_path) == {}


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("error", "raised"), [(lambda: OptionError("no"), OptionError), (full_disk, OutputError)])
def test_nothing_stays_where_the_same_command_would_fail_again(tmp_path, error, raised):
    with pytest.raises(raised):
        work_on(tmp_path / "out", 2, error=error)
    assert tree(tmp_path) == {}


def test_another_question_begins_afresh_and_says_why(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        work_on(tmp_path / "out", 2)
    assert work_on(tmp_path / "out", asked=ASKED | {"seed": 1}) == [1, 2, 3]
    assert "seed was 0 and is 1; the run begins afresh" in caplog.text
    assert tree(tmp_path) == WHOLE


def test_other_versions_are_another_question(tmp_path, caplog, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        work_on(tmp_path / "out", 2)
    monkeypatch.setattr("locum.runs.versions", lambda: {"torch": "1.0"})
    assert work_on(tmp_path / "out") == [1, 2, 3]
    assert "versions was" in caplog.text


@pytest.mark.parametrize(
    "notes", ["", "{", "[]", "{}", '{"asked": {}, "done": "2", "files": []}', '{"asked": {}, "done": -1, "files": []}']
)
def test_damaged_notes_begin_afresh(tmp_path, notes, caplog):
    with pytest.raises(KeyboardInterrupt):
        work_on(tmp_path / "out", 2)
    (tmp_path / ".out.part-kept" / PROGRESS).write_text(notes)
    assert work_on(tmp_path / "out") == [1, 2, 3]
    assert "begins afresh" in caplog.text and tree(tmp_path) == WHOLE


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        work_on(tmp_path / "out", 2)
    assert {k: v for k, v in tree(tmp_path).items() if k.startswith("out")} == {"out": b"", "out/old": b"old"}
    work_on(tmp_path / "out")
    assert tree(tmp_path) == WHOLE


def test_what_an_old_output_is_replaced_by_is_never_gone_on_with(tmp_path, monkeypatch):
    """Killed between the exchange of the two folders and the removal of the old one, which is in the new one's place."""
    work_on(tmp_path / "out")
    monkeypatch.setattr("locum.runs.clear", lambda path: None)
    work_on(tmp_path / "out", asked=ASKED | {"seed": 1})
    assert (tmp_path / ".out.part-kept").is_dir()
    monkeypatch.undo()
    assert work_on(tmp_path / "out", asked=ASKED | {"seed": 1}) == [1, 2, 3]
    assert tree(tmp_path) == WHOLE


def test_states_of_an_output_are_removed_and_no_others(tmp_path):
    out, others = (
        tmp_path / "out",
        [
            ".out.notes",
            ".outer.partial",
            ".out.2.partial",
            ".out.partial-1-of-x",
            ".out.recover-0-of-2",
            "out.partial",
            ".out.recover.recover",
        ],
    )
    for name in (
        ".out.partial-0-of-2",
        ".out.partial-1-of-2",
        ".out.answers-1-of-2",
        "..out.calibrated.partial-0-of-2",
    ):
        (tmp_path / name).write_text("of a rank")
    assert len(places_of_states(out)) == len({*places_of_states(out)})
    for place in places_of_states(out):
        place.write_text("state")
    for name in others:
        (tmp_path / name).write_text("not ours")
    for _ in range(2):
        (tmp_path / ".out.answers").write_text("aside")
        set_aside(tmp_path / ".out.answers", "it is damaged")
    clear_states(out)
    asides = [".out.answers.aside", ".out.answers.aside-2"]
    assert set(tree(tmp_path)) == {*others, *asides}
    assert [path.name for path in asides_of(out)] == asides
    assert beside(out, "answers").name == ".out.answers"
