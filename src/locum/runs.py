"""Runs beside and after one another: one at a time writes an output, and goes on only from what answers its question."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .errors import OutputError
from .files import check_place, clear, sweep

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())  # outputs that this run has reserved


@contextlib.contextmanager
def reserved(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Keep every other run from writing an output, and from the work folders beside it, until the block ends.

    A run that another one is in the way of waits for it or raises OutputError. A stage inside a stage may reserve the
    same output again, or what stands beside it. The lock is a file beside the output, which the system unlocks when its
    process ends, however that is.
    """
    check_place(Path(path))
    real = Path(os.path.realpath(path))
    if _is_ours(real):
        yield
        return
    missing = [folder for folder in real.parents if not folder.exists()]
    try:
        with _locked(real.with_name(f".{real.name}.lock"), Path(path), wait):
            before = _held.set(_held.get() | {real})
            try:
                sweep(real)
                yield
            finally:
                _held.reset(before)
    finally:
        with contextlib.suppress(OSError):  # folders with something in them stay
            for folder in missing:
                folder.rmdir()


def _is_ours(real: Path) -> bool:
    """Whether this run has reserved an output, or the one that it stands beside for a while (.OUT.something)."""
    return any(
        real == held or (real.parent == held.parent and real.name.startswith(f".{held.name}.")) for held in _held.get()
    )


@contextlib.contextmanager
def _locked(lock: Path, path: Path, wait: bool) -> Iterator[None]:
    """A file that this run alone has locked. It is gone afterwards, before it is unlocked: so who was waiting for it
    sees that its name is of no file any more, and makes a new one."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run that had made the folder has removed it
            continue
        try:
            _wait_for(handle, path, wait)
            if not (lock.exists() and os.path.samestat(os.fstat(handle), lock.stat())):
                continue
            try:
                with contextlib.suppress(OSError):  # a full disk; for the message of others alone
                    os.pwrite(handle, f"{os.getpid()}".ljust(20).encode(), 0)
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _wait_for(handle: int, path: Path, wait: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        process = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
        raise OutputError(
            f"another run is writing {path} now (process {process}); wait until it has ended, or choose another name"
        ) from None
    except OSError:  # a file system without locks
        return


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """How the question that something answers differs from the one that is asked, in words; empty where it does not."""
    differ = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in differ)


def set_aside(path: Path, why: str) -> None:
    """Move what an interrupted run left, and this one cannot go on from, out of the way, with a word."""
    aside = path.with_name(f"{path.name}.aside")
    clear(aside)
    os.replace(path, aside)
    logger.warning("%s; it was set aside as %s, and the run begins afresh", why, aside)
