"""Runs beside one another: one writes an output at a time; runs after one another: what was left is taken or set aside."""

from __future__ import annotations

import contextlib
import errno
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import locum
from locum.errors import OutputError
from locum.files import write_text
from locum.measure.rows import Row, read_rows, write_rows
from locum.runs import differences, reserved, set_aside
from locum.stages.options import alone
from making.checkpoints import tree

WRITERS = [
    name
    for name in locum.__all__
    if inspect.isroutine(getattr(locum, name)) and "out" in inspect.signature(getattr(locum, name)).parameters
]


@contextlib.contextmanager
def another_run(path):
    """Another run holds an output: a thread knows as little of what this one reserved as a process does."""
    holds, done = threading.Event(), threading.Event()

    def hold():
        with reserved(path):
            holds.set()
            done.wait(30)

    with ThreadPoolExecutor() as pool:
        run = pool.submit(hold)
        try:
            assert holds.wait(30)
            yield
        finally:
            done.set()
            run.result()


def test_one_run_at_a_time_writes_an_output(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with another_run(tmp_path / "out"):
        for name in ("out", "link"):
            said = rf"another run is writing .*{name} now \(process \d+\); wait"
            with pytest.raises(OutputError, match=said), reserved(tmp_path / name):
                pass
        with reserved(tmp_path / "another"):
            pass
    with reserved(tmp_path / "out"):
        pass
    assert set(tree(tmp_path)) == {"link"}


@pytest.mark.parametrize("name", WRITERS)
def test_every_stage_is_alone_with_its_output(name, tmp_path):
    """Whatever else it was given: the output is reserved before anything is looked at."""
    function = getattr(locum, name)
    given = ["x" for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = {
        p.name: "x"
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    }
    with another_run(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing"):
        function(*given, **needed | {"out": tmp_path / "out"})
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["out", "picture"])
@pytest.mark.parametrize("force", [False, True])
def test_a_stage_replaces_what_came_meanwhile_with_force_alone(name, force, tmp_path):
    @alone
    def stage(*, out=None, picture=None, force=False):
        (tmp_path / "a").write_text("theirs")
        write_text(tmp_path / "a", "ours")

    with (
        contextlib.nullcontext() if force else pytest.raises(OutputError, match=r"another program .* result is .*a\.2")
    ):
        stage(**{name: tmp_path / "a", "force": force})
    assert tree(tmp_path) == ({"a": b"ours"} if force else {"a": b"theirs", "a.2": b"ours"})


def test_writers_are_the_stages():
    assert set(WRITERS) >= {"apply", "bench", "calibrate", "compress", "demo", "export", "plan", "recover", "search"}


def test_a_stage_inside_a_stage_reserves_again(tmp_path):
    with reserved(tmp_path / "out"), reserved(tmp_path / "out"), reserved(tmp_path / ".out.unrecovered"):
        assert [p.name for p in tmp_path.iterdir()] == [".out.lock"]
    assert tree(tmp_path) == {}


def test_the_lock_of_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / ".out.lock").write_text("12345")
    with reserved(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {}


def test_nothing_stays_but_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}
    with reserved(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").write_text("new")
    assert set(tree(tmp_path)) == {"a", "a/b", "a/b/out"}


def test_who_waits_gets_it_when_the_other_has_ended(tmp_path):
    order = []

    def wait():
        with reserved(tmp_path / "out", wait=True):
            order.append("second")

    with ThreadPoolExecutor() as pool:
        with reserved(tmp_path / "out"):
            second = pool.submit(wait)
            with pytest.raises(TimeoutError):
                second.result(0.1)
            order.append("first")
        second.result(30)
    assert order == ["first", "second"] and tree(tmp_path) == {}


def test_rows_of_evaluations_that_end_together_are_all_there(tmp_path):
    def write(number):
        write_rows(tmp_path / "rows", [Row(f"{number}", None, "loss", "a", 1.0, None, None, 1, 0, 1.0, 1, {})])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert {row.model for row in read_rows(tmp_path / "rows")} == {f"{number}" for number in range(24)}
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


ROW = Row("m", None, "loss", "a", 1.0, None, None, 1, 0, 1.0, 1, {})


def broken_disk(path):
    raise OSError(errno.EIO, "Input/output error", str(path))


def full_disk(path):
    raise OutputError(f"no space left for {path}")


@pytest.mark.parametrize("disk", [broken_disk, full_disk])
def test_rows_that_cannot_be_written_are_in_the_error(disk, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows", [ROW])
    monkeypatch.setattr("locum.measure.rows.write_text", lambda path, text: disk(path))
    with pytest.raises(OutputError, match=r"rows.*; what was measured is printed instead") as caught:
        write_rows(tmp_path / "rows", [replace(ROW, model="new")])
    (tmp_path / "printed").write_text(caught.value.unwritten)
    assert [row.model for row in read_rows(tmp_path / "printed")] == ["new"]
    assert [row.model for row in read_rows(tmp_path / "rows")] == ["m"]


@pytest.mark.parametrize("theirs", [b"words\n", b"\xff\xfe", b"[]\n"])
def test_rows_are_not_added_to_what_holds_none(theirs, tmp_path):
    """Whoever wrote it, while the evaluation ran."""
    (tmp_path / "rows").write_bytes(theirs)
    with pytest.raises(OutputError, match=r"rows.*printed instead"):
        write_rows(tmp_path / "rows", [ROW])
    assert tree(tmp_path) == {"rows": theirs}


def test_differences_name_what_differs():
    assert differences({"a": 1, "b": [1]}, {"a": 1, "b": [1]}) == ""
    assert (
        differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == "a was 1 and is None, b was 2 and is 3, c was None and is 4"
    )


def test_what_is_set_aside_is_said_and_kept(tmp_path, caplog):
    for text in ("one", "two"):
        (tmp_path / "state").write_text(text)
        set_aside(tmp_path / "state", "it is damaged")
    assert tree(tmp_path) == {"state.aside": b"one", "state.aside-2": b"two"}
    assert caplog.messages[0] == f"it is damaged; it was set aside as {tmp_path}/state.aside, and the run begins afresh"
