"""Runs beside and after one another: one at a time writes an output, and goes on only from what answers its question.

What a run keeps, so that the same command goes on after it was killed, stands beside its output, as `.OUT.STATE`:

    partial                  sums of a calibration; of several ranks partial-R-of-N
    calibrated, answers      of a search: its calibration, and what trying removals on the model gave; answers-R-of-N
    part-kept                a checkpoint that is being written (`resumable`)
    recover                  the last state of a training, and its log
    statistics.safetensors   of `compress`
    unrecovered              of `compress --recover`: the checkpoint that is trained
    unpacked                 of `compress --rest`: the checkpoint whose weights outside of the experts are packed, in a folder
    rounds                   of `compress --rounds`: what the last round left, and statistics of it, in a folder

A stage that ends well removes all of them (`clear_states`). What could not be gone on from is set aside, as `.OUT.STATE.aside`.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import logging
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from . import ranks
from .errors import LocumError, OutputError
from .files import check_place, clear, sweep, sync, versions, whole, write_text
from .json_text import parse_json

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

STATES = (
    *("partial", "calibrated", "answers", "part-kept", "recover", "logits"),
    *("statistics.safetensors", "unrecovered", "unpacked"),
    "rounds",
)
OUTPUTS_INSIDE = ("calibrated", "statistics.safetensors", "unrecovered")  # what a stage inside the run writes
RANK = re.compile(r"\.(?:partial|answers)-\d+-of-\d+")  # what each of several ranks keeps for itself
PROGRESS = ".locum-progress.json"  # in a folder that a run goes on with
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


def is_reserved(out: str | Path) -> bool:
    """Whether this run has reserved an output already: it is written by a stage inside another one that writes it."""
    return Path(os.path.realpath(out)) in _held.get()


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
            if not _is_named(handle, lock):
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


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path; others may remove it at any moment."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


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


# --- runs after one another -------------------------------------------------------------------------------------


def beside(out: Path, state: str) -> Path:
    """Where a run that writes `out` keeps one of STATES."""
    return out.with_name(f".{out.name}.{state}")


def beside_for_rank(out: Path, state: str) -> Path:
    """Where this rank of a run that writes `out` keeps a state of its own."""
    of_rank = f"-{ranks.number()}-of-{ranks.count()}" if ranks.count() > 1 else ""
    return beside(out, f"{state}{of_rank}")


def places_of_states(out: Path) -> list[Path]:
    """Where runs that write `out`, and the stages in them, keep states; of several ranks, those that there are."""
    written = [out, *(beside(out, stage) for stage in OUTPUTS_INSIDE)]
    return [place for one in written for place in (*(beside(one, state) for state in STATES), *_of_ranks(one))]


def _of_ranks(out: Path) -> list[Path]:
    """What ranks of a run that wrote `out` kept for themselves."""
    return [path for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*-of-*")) if RANK.fullmatch(path.suffix)]


def clear_states(out: Path) -> None:
    """Remove all of them, and what killed runs left of them: the output is there."""
    for place in places_of_states(out):
        with contextlib.suppress(OSError):  # nothing is wrong with the output
            clear(place)


def asides_of(out: Path) -> list[Path]:
    """What was set aside of runs that write `out`."""
    return [
        aside
        for place in places_of_states(out)
        for aside in sorted(place.parent.glob(f"{glob.escape(place.name)}.aside*"))
    ]


class Work:
    """A folder that is to become an output, and how many of the steps to it are done. `asked` is the question it answers.

    Several ranks write into one folder; the first one makes it and notes what is done.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder, self.done = folder, 0
        self._asked = parse_json(json.dumps({**asked, "versions": versions()}))
        self._progress = folder / PROGRESS

    def open(self) -> None:
        """Take up what an interrupted run left, if it answers the same; remove what it wrote after its last `save`."""
        if ranks.is_first():
            self._take_up()
        self.done = ranks.told(self.done)

    def _take_up(self) -> None:
        self.done, files, why = self._left()
        if why:
            logger.warning("%s cannot be gone on from: %s; the run begins afresh", self.folder, why)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            self.close()
        for left in self.folder.iterdir():
            if left.name not in files:
                clear(left)

    def _left(self) -> tuple[int, list[str], str]:
        """How many steps an interrupted run had done, what it had written then, and why they are of no use, if so."""
        if not self._progress.is_file():
            return 0, [], ""
        try:
            notes = parse_json(self._progress.read_text(encoding="utf-8"))
            differ, done = differences(notes["asked"], self._asked), operator.index(notes["done"])
            files = [self._progress.name, *map(str, notes["files"])]
            if done < 0:
                raise ValueError(done)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return 0, [], f"it is damaged ({error!r})"
        return (0, [], differ) if differ else (done, files, "")

    def save(self, done: int) -> None:
        """So many steps are done, by all ranks, whatever happens from now on: what they wrote is on the disk before it is noted."""
        ranks.wait()
        if ranks.is_first():
            sync(self.folder)
            files = sorted(path.name for path in self.folder.iterdir())
            write_text(self._progress, json.dumps({"asked": self._asked, "done": done, "files": files}))
        self.done = done

    def close(self) -> None:
        """It is about to take its name, and what had that name to be here: no run goes on with it."""
        self._progress.unlink(missing_ok=True)

    @property
    def is_kept(self) -> bool:
        return self._progress.is_file()


@contextlib.contextmanager
def resumable(out: Path, asked: Mapping[str, Any]) -> Iterator[Work]:
    """A folder beside `out` that takes its name when the block ends well, as by `whole`; an interrupt leaves what was saved
    of it, and a run that asks the same goes on from there. After an error nothing stays. Of several ranks, the first one does
    in the block what is left to do when all have been there; they leave it together."""
    out = Path(os.path.realpath(out))
    work = Work(beside(out, "part-kept"), asked)
    if not ranks.is_first():
        work.open()
        yield work
        ranks.wait()
        return
    try:
        with whole(out, "folder", work.folder):
            work.open()
            yield work
            work.close()
    except LocumError:
        clear(work.folder)
        raise
    except BaseException:
        if not work.is_kept:
            clear(work.folder)
        raise
    clear(work.folder)
    ranks.wait()


def bytes_begun(out: Path) -> int:
    """Bytes on the disk of what an interrupted run has written of an output: the next one goes on with them or frees them."""
    kept = beside(Path(os.path.realpath(out)), "part-kept")
    return sum(file.stat().st_blocks * 512 for file in kept.glob("*") if file.is_file())


def other_versions(theirs: Any) -> str:
    """How the versions that made something differ from those that run, in words; empty where they do not."""
    return differences(theirs if isinstance(theirs, Mapping) else {}, versions())


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """How the question that something answers differs from the one that is asked, in words; empty where it does not."""
    differ = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in differ)


def set_aside(path: Path, why: str) -> None:
    """Move what an interrupted run left, and this one cannot go on from, out of the way, with a word. Nothing is lost."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    asides = (path.with_name(f"{path.name}.aside{number}") for number in numbers)
    aside = next(place for place in asides if not os.path.lexists(place))
    os.replace(path, aside)
    logger.warning("%s; it was set aside as %s, and the run begins afresh", why, aside)
