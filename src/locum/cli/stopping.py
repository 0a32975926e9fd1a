"""SIGTERM and SIGHUP end a command as Ctrl-C does: schedulers, containers and closed terminals send them."""

from __future__ import annotations

import signal
from types import FrameType


def stop_politely() -> None:
    """Have the signals that ask a process to end raise KeyboardInterrupt, so that nothing half-written stays.

    One that is ignored stays so: that is how nohup keeps a command alive.
    """
    for number in _signals():
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)


def _signals() -> list[int]:
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _stop(number: int, frame: FrameType | None) -> None:
    for other in _signals():  # a second one must not disturb the clearing up
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt
