"""Trials: a command is killed, sometimes again, run to its end, and its output compared with that of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.process import Ending, Limits, Running, threads
from locum.runs import beside, places_of_states

from .comparison import Difference, compare
from .stages import STAGES, Stage, make_world, shorten_intervals

Row = dict[str, Any]
LIMITS = Limits(seconds=100, memory=8 << 30)
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds in which the system counts a process's computing
EXISTS = "exists already"  # said by a command whose output is there


@dataclass
class Reference:
    """The output of an uninterrupted run, and the seconds that it took, without the import of Locum: passed, and computing."""

    output: Path
    seconds: float
    cpu_seconds: float


@dataclass
class Trial:
    """What is tried: a stage; whether an old output is to be replaced; whether the run that is killed has another option."""

    number: int
    stage: Stage
    force: bool
    changed: bool
    moments: list[tuple[float, bool]]  # of each kill: a share of the time that passes, or of that spent computing

    @classmethod
    def draw(cls, seed: int, number: int, stages: list[str]) -> Trial:
        """Trial `number` of a seed."""
        stage, draw = STAGES[stages[number % len(stages)]], random.Random(f"{seed} {number}")
        changed = draw.random() < 0.2 and bool(stage.other)
        moments = [(draw.random(), draw.random() < 0.5) for _ in range(draw.choice((1, 1, 2)))]
        return cls(number, stage, draw.random() < 0.4, changed, moments)


@dataclass
class Found:
    """What became of a trial."""

    kills: int = 0
    finished: int = 0  # runs that had ended before they were to be killed
    went_on: int = 0  # killed runs that left a state
    started_over: int = 0  # killed runs that left none
    left_out: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def take(self, what: str, difference: Difference) -> None:
        self.left_out |= difference.left_out
        self.wrong += [f"{what}: {wrong}" for wrong in difference.wrong]


class Campaign:
    """Kills `command`, a function that reads sys.argv. Everything is in the folder `out`."""

    def __init__(
        self, command: Callable[[], object], out: Path, seed: int, stages: list[str], keep: bool = False
    ) -> None:
        self.command, self.out, self.seed, self.stages, self.keep = command, out, seed, stages, keep
        self.world, self.rows_file = out / "world", out / "rows.jsonl"
        self.references: dict[tuple[str, str], Reference] = {}

    def run(self, kills: int, resume: bool = False) -> list[Row]:
        """Rows of as many trials as it takes to kill so often. A run that resumes keeps those that are there."""
        rows = self._rows_there() if resume else []
        if not rows:
            self._begin()
        numbers = {row["number"] for row in rows}
        number, started = 0, time.monotonic()
        with self.rows_file.open("a", encoding="utf-8") as file:
            while sum(row["kills"] for row in rows) < kills:
                if number not in numbers:
                    rows.append(self.try_one(number))
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
                    done, wrong = sum(row["kills"] for row in rows), sum(bool(row["wrong"]) for row in rows)
                    spent = time.monotonic() - started
                    print(f"{done} kills in {len(rows)} trials after {spent:.0f} s, wrong {wrong}", flush=True)
                number += 1
        return rows

    def _rows_there(self) -> list[Row]:
        lines = self.rows_file.read_text(encoding="utf-8").splitlines() if self.rows_file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _begin(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        (self.out / "references").mkdir(parents=True)
        ending = self._work(lambda: make_world(self.world), self.out / "making")
        if ending.code:
            raise RuntimeError(f"the world was not made:\n{ending.stderr}")

    def show(self, number: int) -> Row:
        """One trial in the world that is there; its folder stays."""
        if not self.world.is_dir():
            self._begin()
        return self.try_one(number)

    # --- one trial --------------------------------------------------------------------------------------------------

    def try_one(self, number: int) -> Row:
        trial, found, began = Trial.draw(self.seed, number, self.stages), Found(), time.monotonic()
        stage, place = trial.stage, self._place(f"trial-{number:04}")
        reference = self._reference(stage, "")
        other = self._reference(stage, stage.other) if stage.other else reference
        force = ("--force",) if trial.force else ()
        out = place / stage.out
        if trial.force:
            _copy(other.output, out)
        old = other.output if trial.force or trial.changed else None
        for attempt, moment in enumerate(trial.moments):
            option = (stage.other,) if trial.changed and attempt == 0 else ()
            line = stage.arguments("../world", *option, *force)
            ending = self._kill(place, line, other if option else reference, *moment)
            if ending.stopped:
                found.wrong.append(f"it did not go on any more: {ending.stderr[-2000:]}")
            elif ending.code != -signal.SIGKILL:
                found.finished += 1
                continue
            found.kills += 1
            states = any(p.exists() for p in places_of_states(out) if p.name != beside(out, "part-kept").name)
            states |= any(beside(out, "part-kept").glob(".locum-progress.json"))
            found.went_on, found.started_over = found.went_on + states, found.started_over + (not states)
            self._look(trial, f"after kill {attempt + 1}", out, old, reference.output, found)
        self._finish(trial, place, force, old, reference, found)
        if not (self.keep or found.wrong):
            self._remove(place)
        return {
            "number": number,
            "seed": self.seed,
            "stage": stage.name,
            "force": trial.force,
            "changed": trial.changed,
            "moments": [
                [round(share, 4), "computing" if is_computing else "time"] for share, is_computing in trial.moments
            ],
            "seconds": round(time.monotonic() - began, 1),
            **vars(found),
            "left_out": sorted(found.left_out),
        }

    def _look(self, trial: Trial, when: str, out: Path, old: Path | None, new: Path, found: Found) -> None:
        """What is at the output while its command is not done: nothing, what was there, or all of the new one."""
        if not out.exists():
            if trial.force:
                found.wrong.append(f"{when}: the old output is lost")
            return
        differences = [compare(out, theirs) for theirs in (new, old) if theirs is not None]
        if all(difference.wrong for difference in differences):
            found.take(f"{when}, something wrong can be read", differences[0])

    def _finish(
        self, trial: Trial, place: Path, force: tuple[str, ...], old: Path | None, reference: Reference, found: Found
    ) -> None:
        """Run the command to its end; then nothing but the output must be there, and it must be the right one."""
        stage, out = trial.stage, place / trial.stage.out
        ending = self._run(place, stage.arguments("../world", *force))
        exists = not trial.force and EXISTS in ending.stderr
        expected = old if exists and trial.changed and compare(out, reference.output).wrong else reference.output
        if ending.code and not exists:
            found.wrong.append(f"the same command ended with {ending.code}: {ending.stderr[-2000:]}")
            return
        found.take("the output", compare(out, expected))
        if (
            exists or trial.changed
        ):  # the other run's state was set aside; a finished one may have had no time to remove it
            cleaned = self._run(place, f"clean {stage.out}")
            if cleaned.code:
                found.wrong.append(f"locum clean ended with {cleaned.code}: {cleaned.stderr[-300:]}")
        if left := sorted(path.name for path in place.iterdir() if path != out):
            found.wrong.append(f"left over: {', '.join(left)}")

    # --- running ----------------------------------------------------------------------------------------------------

    def _reference(self, stage: Stage, option: str) -> Reference:
        """The output of an uninterrupted run, made when it is first asked for. The second run shows that runs are alike."""
        key = (stage.name, option)
        if key not in self.references:
            kept = self.out / "references" / "".join(c if c.isalnum() else "-" for c in f"{stage.name} {option}")
            about = kept / "about.json"
            if not about.is_file():
                shutil.rmtree(kept, ignore_errors=True)
                endings = [self._uninterrupted(stage, option, kept / name) for name in ("one", "two")]
                if wrong := compare(kept / "one" / stage.out, kept / "two" / stage.out).wrong:
                    raise RuntimeError(f"two uninterrupted runs of {stage.name} differ: {wrong[:3]}")
                took = {key: min(getattr(ending, key) for ending in endings) for key in ("seconds", "cpu_seconds")}
                about.write_text(json.dumps(took))
            self.references[key] = Reference(kept / "one" / stage.out, **json.loads(about.read_text()))
        return self.references[key]

    def _uninterrupted(self, stage: Stage, option: str, kept: Path) -> Ending:
        place = self._place("uninterrupted")
        ending = self._run(place, stage.arguments("../world", *([option] if option else [])))
        if ending.code:
            raise RuntimeError(f"{stage.name} does not work: {ending.stderr}")
        if left := sorted(path.name for path in place.iterdir() if path.name != stage.out):
            raise RuntimeError(f"{stage.name} leaves {left}")
        shutil.copytree(place, kept)
        self._remove(place)
        return ending

    def _kill(self, place: Path, line: str, usual: Reference, share: float, is_computing: bool) -> Ending:
        """Run a command and kill it when it has taken this share of what it takes, or a moment later."""
        running = self._start(place, line)
        until = share * (usual.cpu_seconds if is_computing else usual.seconds)
        while (ending := running.poll()) is None:
            spent = _computed(running.pid) if is_computing else time.monotonic() - running.started
            if spent >= until:
                time.sleep(random.random() * TICK)
                running.stop()
                return running.wait()
            time.sleep(TICK / 4)
        return ending

    def _run(self, place: Path, line: str) -> Ending:
        return self._start(place, line).wait()

    def _start(self, place: Path, line: str) -> Running:
        def work() -> None:
            os.environ["XDG_CACHE_HOME"] = f"{place}.cache"
            shorten_intervals()
            sys.argv = ["locum", *shlex.split(line)]
            self.command()

        return self._work_in(work, place)

    def _work(self, work: Callable[[], object], place: Path) -> Ending:
        place.mkdir(parents=True)
        return self._work_in(work, place).wait()

    def _work_in(self, work: Callable[[], object], place: Path) -> Running:
        if (others := threads()) > 1:
            raise RuntimeError(f"{others} threads: children would be left with their locks")
        return Running(work, place, LIMITS)

    def _place(self, name: str) -> Path:
        """An empty folder to run in, and a cache of its own: what one trial keeps is not there for another."""
        place = self.out / name
        self._remove(place)
        place.mkdir(parents=True)
        cache = place.with_name(f"{name}.cache") / "locum"
        cache.mkdir(mode=0o700, parents=True)
        kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locum" / "kernels"
        if kernels.is_dir():  # compiling them takes longer than any command here
            shutil.copytree(kernels, cache / "kernels")
        return place

    def _remove(self, place: Path) -> None:
        for path in place.parent.glob(f"{place.name}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _computed(pid: int) -> float:
    """Seconds of computing of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
