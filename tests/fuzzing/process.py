"""A piece of work in a process of its own, forked from this one, under limits of memory and of time.

Forking saves the ten seconds that importing torch and transformers takes. It is safe while this process has one thread:
so a program that forks imports, and lets its children compute (`threads` counts).
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LARGEST_FILE = 2 << 30
LAST_WORDS = 0.5  # seconds for a process that is over a limit to say where it is
PAGE = os.sysconf("SC_PAGE_SIZE")
HANG, MEMORY = "hang", "memory"


@dataclass(frozen=True)
class Limits:
    """What a process may take: seconds, and bytes of memory."""

    seconds: float = 60.0
    memory: int = 4 << 30


@dataclass(frozen=True)
class Ending:
    """How a process ended and what it took. `code` is minus the signal for one that was killed, as subprocess has it."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak: int  # bytes of memory, at most
    stopped: str = ""  # the limit that it was stopped for, if any


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


class Running:
    """Work that was started in a child with `folder` as its current one; `poll` until it returns the ending.

    What the child prints goes to files beside `folder`. A work that returns ends with code 0.
    """

    def __init__(self, work: Callable[[], object], folder: Path, limits: Limits) -> None:
        self.folder, self.limits, self.stopped = folder, limits, ""
        self.started, self.asked_at = time.monotonic(), 0.0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(work, folder, limits)

    def poll(self) -> Ending | None:
        """The ending, or None for what goes on; stops what is over a limit."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            self._watch()
            return None
        self.stop()  # what it started itself
        said = [_said(self.folder, name) for name in ("stdout", "stderr")]
        code = os.waitstatus_to_exitcode(status)
        spent = time.monotonic() - self.started
        return Ending(code, *said, spent, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, self.stopped)

    def wait(self) -> Ending:
        """The ending, whenever it comes."""
        while (ending := self.poll()) is None:
            time.sleep(0.01)
        return ending

    def _watch(self) -> None:
        """Of what is over a limit, ask for the stack, which it prints at once, and end it soon after."""
        now = time.monotonic()
        if self.stopped:
            if now > self.asked_at + LAST_WORDS:
                self.stop()
            return
        if _resident(self.pid) > self.limits.memory:
            self.stopped = MEMORY
        elif now > self.started + self.limits.seconds:
            self.stopped = HANG
        if self.stopped:
            self.asked_at = now
            os.kill(self.pid, signal.SIGUSR1)

    def stop(self) -> None:
        """End the process at once, and those that it started: they are a group."""
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _child(work: Callable[[], object], folder: Path, limits: Limits) -> None:
    """Never returns: neither does the caller's code go on here, nor run its exit handlers."""
    code = 1
    try:
        os.setsid()
        _settle(folder, limits)
        work()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _settle(folder: Path, limits: Limits) -> None:
    """Standard streams to files, a folder for temporary files, and what the kernel itself shall refuse."""
    os.chdir(folder)
    stdin = os.open(os.devnull, os.O_RDONLY)
    os.dup2(stdin, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(_stream(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    scratch = _stream(folder, "tmp")
    scratch.mkdir(exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(scratch), None
    faulthandler.register(signal.SIGUSR1, file=sys.stderr)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _stream(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}.{name}")


def _said(folder: Path, name: str) -> str:
    try:
        return _stream(folder, name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
