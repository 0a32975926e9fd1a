"""Many inputs, some at a time, each in a child: rows of what was answered."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answers import FAULTS, LOCUM, OTHER, SAME, Answer, Snapshot, answer, differing, fields, made_in, snapshot
from .inputs import Input, kind_of, lay_out, make_input
from .kinds import OPTIONS
from .process import Ending, Limits, Running, threads
from .values import WORKING
from .world import make_world

Row = dict[str, Any]
UNLIMITED = Limits(seconds=600, memory=16 << 30)
OURS = (
    "world",
    "making*",
    "input-*",
    "undamaged-*",
    "fields-*",
    "answers.jsonl",
    "summary.md",
)  # in the folder of a campaign
RUNS = 2  # of a command on undamaged files: what differs between them says nothing of damage


@dataclass
class Trial:
    """A command that runs in a place of its own, and how the place was when it started."""

    place: Path
    arguments: tuple[str, ...]
    running: Running
    before: Snapshot
    about: Any  # an Input, or the line of an undamaged run

    def result(self, ending: Ending) -> dict[str, str]:
        return fields(self.place, made_in(self.place, self.before), ending.stdout, self.arguments)

    def remove(self) -> None:
        for path in self.place.parent.glob(f"{self.place.name}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@dataclass
class Undamaged:
    """What a command makes of undamaged files: its exit code, its fields, and those of them that are volatile."""

    code: int
    fields: dict[str, str] = field(default_factory=dict)
    volatile: set[str] = field(default_factory=set)


class Campaign:
    """Tries inputs on `command`, a function that reads sys.argv. Everything is in the folder `out`."""

    def __init__(self, command: Callable[[], object], out: Path, limits: Limits, *, seed: int, jobs: int) -> None:
        self.command, self.out, self.limits, self.seed, self.jobs = command, out, limits, seed, jobs
        self.world, self.answers = out / "world", out / "answers.jsonl"
        self.sources = _digest(Path(LOCUM), "*.py")[:8]

    def run(self, first: int, count: int, kinds: list[str], resume: bool = False) -> list[Row]:
        """A row for each of the inputs of these kinds among so many numbers; all of them are in `answers.jsonl`.

        A run that resumes keeps the world and the rows that are there, and returns them too.
        """
        rows = self._rows_there() if resume else []
        if not rows:
            self._make_world()
        before, started, done = _digest(self.world), time.monotonic(), {row["number"] for row in rows}
        numbers = [n for n in range(first, first + count) if kind_of(n) in kinds and n not in done]
        self._write(rows)
        with self.answers.open("a", encoding="utf-8") as file:
            for tried, (trial, ending) in enumerate(self._all(lambda: map(self._start, numbers)), 1):
                rows.append(self._row(trial, ending))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                trial.remove()  # all but its fields
                if tried % 50 == 0:
                    print(f"{tried} of {len(numbers)} after {time.monotonic() - started:.0f} s", flush=True)
        rows = self._compared(rows)
        self._write(rows)
        for path in self.out.glob("fields-*"):
            path.unlink()
        if _digest(self.world) != before:
            raise RuntimeError(
                f"an input changed {self.world}, which only its copies should be: look for outputs that left"
            )
        return rows

    def _rows_there(self) -> list[Row]:
        """The answers of the run before, but for a line that it had not finished."""
        lines = self.answers.read_text(encoding="utf-8").splitlines() if self.answers.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        if other := {row["seed"] for row in rows} - {self.seed}:
            raise RuntimeError(f"{self.answers} holds answers of seed {min(other)}; choose another --out")
        return rows

    def _write(self, rows: list[Row]) -> None:
        whole = self.answers.with_suffix(".new")
        whole.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole.replace(self.answers)

    def show(self, number: int) -> int:
        """Try one input and print all about it; its folder stays."""
        if not self.world.is_dir():
            self._make_world()
        trial = self._start(number)
        print(f"{trial.about.number}, {trial.about.kind}: {trial.about.damaged}\ncd {trial.place}\n{trial.about.shown}")
        ending = trial.running.wait()
        row = self._compared([self._row(trial, ending)])[0]
        self._fields_of(number).unlink(missing_ok=True)
        print(ending.stdout[-3000:], ending.stderr, json.dumps(row, indent=1), sep="\n")
        return int(row["fault"])

    # --- one after another ----------------------------------------------------------------------------------------------

    def _make_world(self) -> None:
        for old in (p for pattern in OURS for p in self.out.glob(pattern)):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        making = self.out / "making"
        making.mkdir(parents=True)
        ending = Running(lambda: make_world(self.world), making, UNLIMITED).wait()
        if ending.code:
            raise RuntimeError(f"the world of undamaged files was not made:\n{ending.stderr}")

    def _all(self, trials: Callable[[], Iterator[Trial]]) -> Iterator[tuple[Trial, Ending]]:
        """Endings as they come, with as many at work as there are jobs."""
        waiting, at_work = trials(), deque[Trial]()
        try:
            while True:
                at_work.extend(itertools.islice(waiting, self.jobs - len(at_work)))
                if not at_work:
                    return
                for _ in range(len(at_work)):
                    trial = at_work.popleft()
                    ending = trial.running.poll()
                    if ending is None:
                        at_work.append(trial)
                    else:
                        yield trial, ending
                time.sleep(0.01)
        finally:
            for trial in at_work:
                trial.running.stop()

    def _start(self, number: int) -> Trial:
        place = self.out / f"input-{number:05}"
        lay_out(self.world, place)
        made = make_input(self.seed, number, place)
        return self._trial(place, made.arguments, made)

    def _trial(self, place: Path, arguments: tuple[str, ...], about: Any) -> Trial:
        if (others := threads()) > 1:
            raise RuntimeError(
                f"{others} threads: children would be left with their locks; import nothing that starts any"
            )
        before = snapshot(place)

        def work() -> None:
            sys.argv = ["locum", *arguments]
            self.command()

        return Trial(place, arguments, Running(work, place, self.limits), before, about)

    # --- what is said of an input ---------------------------------------------------------------------------------------

    def _row(self, trial: Trial, ending: Ending) -> Row:
        made: Input = trial.about
        found: Answer = answer(ending, made.arguments[0])
        accepted = found.result == SAME
        new = {name.partition("/")[0] for name in made_in(trial.place, trial.before)}
        if accepted:
            self._fields_of(made.number).write_text(json.dumps(trial.result(ending)), encoding="utf-8")
        return {
            "number": made.number,
            "seed": self.seed,
            "sources": self.sources,
            "kind": made.kind,
            "damaged": made.damaged,
            "command": made.shown[:2000],
            "line": made.line,
            "result": found.result,
            "fault": found.result in FAULTS,
            "where": found.where,
            "said": found.said,
            "seconds": round(ending.seconds, 2),
            "cpu_seconds": round(ending.cpu_seconds, 2),
            "peak_bytes": ending.peak,
            "left": [] if accepted else sorted(new),
        }

    def _fields_of(self, number: int) -> Path:
        """Where the fields of what was accepted wait for the undamaged ones."""
        return self.out / f"fields-{number:05}.json"

    def _compared(self, rows: list[Row]) -> list[Row]:
        """The rows in order, acceptances compared to undamaged runs; those of a run before have been.

        Lines of damaged files and those of every command are run undamaged, so that one which never works is found. Lines
        with a name of a choice may be refused as they are.
        """
        fresh = [row for row in rows if "differs" not in row]
        works = {row["line"] for row in fresh if row["kind"] != OPTIONS or row["line"] in WORKING}
        lines = sorted(works | {row["line"] for row in fresh if row["result"] == SAME})
        runs: dict[str, list[tuple[int, dict[str, str]]]] = {line: [] for line in lines}
        for trial, ending in self._all(lambda: (self._start_undamaged(i, line) for i in range(RUNS) for line in lines)):
            runs[trial.about].append((ending.code, trial.result(ending) if ending.code == 0 else {}))
            trial.remove()
        usual = {
            line: Undamaged(code, one, {name for name in {*one, *two} if one.get(name) != two.get(name)})
            for line, ((code, one), (_, two)) in runs.items()
        }
        if broken := sorted(line for line in works if usual[line].code):
            raise RuntimeError(f"of undamaged files this does not work, so it says nothing of damage: {broken[0]}")
        return [self._compare(row, usual) for row in sorted(rows, key=lambda row: row["number"])]

    def _start_undamaged(self, run: int, line: str) -> Trial:
        place = self.out / f"undamaged-{hashlib.sha256(line.encode()).hexdigest()[:8]}-{run}"
        lay_out(self.world, place)
        return self._trial(place, tuple(shlex.split(line)), line)

    def _compare(self, row: Row, usual: dict[str, Undamaged]) -> Row:
        if row["result"] != SAME or "differs" in row:
            return {"differs": []} | row
        found, undamaged = json.loads(self._fields_of(row["number"]).read_text(encoding="utf-8")), usual[row["line"]]
        if undamaged.code:
            return row | {"result": OTHER, "differs": [f"undamaged, the command ends with code {undamaged.code}"]}
        differs = differing(found, undamaged.fields, undamaged.volatile)
        shown = [*differs[:8], f"and {len(differs) - 8} more"] if len(differs) > 9 else differs
        return row | {"result": OTHER if differs else SAME, "differs": shown}


def _digest(folder: Path, pattern: str = "*") -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        digest.update(os.fsencode(path.relative_to(folder)))
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
