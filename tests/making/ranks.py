"""Commands on several ranks, forked from the test's own process: nobody imports Locum anew, as torchrun's ranks do.

The test stands in for torchrun. Ranks that wait for one that has died have to find out for themselves.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from locum.cli import main

PATIENCE = 120.0  # seconds


class Ranks:
    """Processes that run one command. What rank r says on either stream goes to the file `said-r` of a folder."""

    def __init__(
        self, count: int, folder: Path, *words: object, first: Callable[[int], None] = lambda rank: None
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        about = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.files = [folder / f"said-{rank}" for rank in range(count)]
        self.pids = [self._fork(rank, about, words, first) for rank in range(count)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, about: dict[str, object], words: tuple[object, ...], first: Callable) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            said = os.open(self.files[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            os.environ |= {name: str(value) for name, value in {**about, "RANK": rank, "LOCAL_RANK": rank}.items()}
            sys.argv = ["locum", *map(str, words)]
            first(rank)
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def look(self) -> None:
        """Note the exit codes of those that have ended: minus the signal of one that was killed."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(ended[1])

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes of all."""
        until = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            self.look()
            if time.monotonic() > until:
                self.kill(*(pid for rank, pid in enumerate(self.pids) if rank not in self.codes))
                raise TimeoutError(f"ranks are not done after {seconds} s: {self.said}")
            time.sleep(0.02)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def kill(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, 9)

    @property
    def said(self) -> list[str]:
        return [file.read_text() for file in self.files]


def on_ranks(count: int, folder: Path, *words: object) -> list[str]:
    """Run a command on so many ranks, which must end well; what each of them said. `folder` is for that alone."""
    started = Ranks(count, folder, *words)
    assert started.wait() == [0] * count, started.said
    return started.said


def stops_in(patched: object, name: str, number: int, after: bool = True) -> None:
    """Have a method or function that stops for good at its call of this number, after it or before; a file says so."""
    real, calls = getattr(patched, name), []

    def slow(*given):
        calls.append(1)
        result = real(*given) if after else None
        if len(calls) == number:
            Path(os.environ["READY"]).touch()
            time.sleep(600)
        return result if after else real(*given)

    setattr(patched, name, slow)


def killed(folder: Path, stops: int, stop: Callable[[], None], *command: object) -> str:
    """Start two ranks, kill -9 the one that stops, and return what the other one says when it has found out."""
    ready = folder / "ready"
    os.environ["READY"] = str(ready)
    started = Ranks(2, folder, *command, first=lambda rank: stop() if rank == stops else None)
    try:
        while not ready.exists():
            time.sleep(0.05)
            started.look()
            assert not started.codes, started.said
        time.sleep(1)  # the other one gets as far as it can
        started.kill(started.pids[stops])
        begin = time.monotonic()
        codes = started.wait(60)
    finally:
        ready.unlink(missing_ok=True)
    assert time.monotonic() - begin < 60 and (codes[stops], codes[1 - stops]) == (-signal.SIGKILL, 2)
    said = started.said[1 - stops]
    assert said.count("\n") == 1 and said.startswith(f"locum {command[0]}: error: another of the 2 ranks has ended")
    assert "the same command again goes on from the last saved state" in said
    return said
