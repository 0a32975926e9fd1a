"""Commands on several ranks, forked from the test's own process: nobody imports Locum anew, as torchrun's ranks do.

The test stands in for torchrun. Ranks that wait for one that has died have to find out for themselves.
"""

from __future__ import annotations

import os
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

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes, minus the signal of one that was killed."""
        until = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[rank] = os.waitstatus_to_exitcode(ended[1])
            if time.monotonic() > until:
                self.kill(*self.pids)
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
