"""What the operating system sends and refuses: signals, files that may not be read, names that are no text, pipes."""

from __future__ import annotations

import errno
import os
import shutil
import signal

import pytest

from locum.cli import cli
from locum.cli.stopping import stop_politely
from making.checkpoints import locum as command
from making.checkpoints import tree

COPIED = [("a/x", "b/x", "[Errno 13] Permission denied: 'a/x'"), ("a/y", "b/y", "[Errno 13] Permission denied: 'a/y'")]
REFUSED = {
    "not allowed": (PermissionError(errno.EACCES, "Permission denied", "m/x"), "m/x: Permission denied; let this user"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file", "x"), "x: No such file; look whether it was moved"),
    "read only": (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system; choose a folder"),
    "no file": (OSError(errno.EIO, "Input/output error"), "Input/output error; look at that file and its disk"),
    "full": (OSError(errno.ENOSPC, "No space left on device", "x"), "no space left on the disk of x; free some"),
    "a copy": (shutil.Error(COPIED), "a/x could not be copied to b/x: [Errno 13] Permission denied: 'a/x'; look"),
    "a copy in words": (shutil.Error("`a` and `b` are the same file"), "`a` and `b` are the same file; look"),
    "of a library": (OSError("It looks wrong.\nAnd more"), "It looks wrong; look at that file"),
    "without words": (OSError(), "OSError; look at that file"),
    "two lines": (OSError(errno.EACCES, "No", "a\nb"), "a b: No; let this user"),
    "memory": (MemoryError(), "there is too little memory; close other programs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_system_refuses_is_one_line(name, monkeypatch):
    error, said = REFUSED[name]

    def refuse(**given):
        raise error

    monkeypatch.setattr(cli.commands["list"], "function", refuse)
    result = command("list")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"locum list: error: {said}") and result.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    def gone(**given):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli.commands["list"], "function", gone)
    assert command("list").stderr == ""


@pytest.mark.parametrize(
    "line", ["inspect {}", "apply m --plan p --out {}", "calibrate m --data {} --out o", "show {}"]
)
def test_a_name_that_is_no_text_is_refused_at_once(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(*line.format(os.fsdecode(b"x\xff")).split())
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert r"x\xff is not text in UTF-8; rename the file or folder" in result.stderr
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "line", ["plan {stats} --remove 0.4 --rank 2 --force --out", "eval {model} --data {words} --out"]
)
def test_a_pipe_is_not_replaced(line, checkpoint, statistics_file, words, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    typed = line.format(stats=statistics_file, model=checkpoint, words=words).split()
    result = command(*typed, tmp_path / "pipe")
    assert result.exit_code == 2 and "pipe is a device, pipe or socket, which is never replaced" in result.stderr
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "line",
    [
        "report {pipe} --out {out}",
        "plan {pipe} --remove 0.4 --out {out}",
        "plan --diff {pipe} {pipe}",
        "plan {stats} --method compressed-experts --onto {pipe} --out {out}",
        "apply {model} --plan {pipe} --out {out}",
        "compress {model} --data {words} --remove 0.4 --statistics {pipe} --out {out}",
        "calibrate {model} --data {pipe} --out {out}",
        "inspect {pipe}",
        "eval {model} --data {words} --append --out {pipe}",
    ],
)
def test_a_pipe_is_not_read(line, checkpoint, statistics_file, words, tmp_path):
    """Where nobody writes, reading waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    places = {"pipe": tmp_path / "pipe", "out": tmp_path / "out", "stats": statistics_file, "model": checkpoint}
    result = command(*line.format(words=words, **places).split())
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "pipe" in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.fixture
def signals():
    """Signals as a new process has them; afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_to_end_are_ctrl_c_and_only_the_first(number, signals):
    stop_politely()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)  # while the first is cleared up after
    signal.raise_signal(signal.SIGHUP)


def test_a_command_under_nohup_stays(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_politely()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
