"""Commands are killed at random moments and given again.

    PYTHONPATH=tests python -m killing [--count 100] [--seed 0] [--stages "apply,search"] [--out build/kill-test]
    PYTHONPATH=tests python -m killing --resume --count 200    what is missing of these kills in the folder
    PYTHONPATH=tests python -m killing --seed 0 --only 17      one trial: what it is, what is wrong, its folder kept

Every trial is made from the seed and its number: a stage, whether it replaces an old output (`--force`), whether the first
run has another option, and when it is killed (SIGKILL): uniform over the time that an uninterrupted run takes, or over what it
computes, importing Locum left out. After each kill, what is at the output must be what was there before, or all that an uninterrupted run makes.
Then the same command runs to its end: its output must be that of an uninterrupted run to the byte, but for the fields that
comparison.py names, and nothing else may be left; `locum clean` takes what was set aside. Exit code 1 where anything is wrong.

`--record FILE` adds a line with the counts to a file of results. `--out` gets `rows.jsonl`, a row for each trial.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers.models.olmoe.modeling_olmoe  # noqa: F401 (every child would import it)

import locum
from locum.cli import main as locum_command

from .campaign import Campaign
from .comparison import LEFT_OUT
from .stages import STAGES

COUNTS = ("kills", "finished", "went_on", "started_over")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="killing", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep what is in the folder, and go on")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this trial alone; its folder stays")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--out", type=Path, default=Path("build/kill-test"), help="folder for what is found")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a line with the counts to these results")
    options = parser.parse_args(given)
    options.stages = options.stages.split(",")
    if unknown := sorted({*options.stages} - {*STAGES}):
        parser.error(f"unknown stage {unknown[0]!r}; allowed: {', '.join(STAGES)}")
    return options


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By stage, and of all: kills, runs that ended before, killed runs with a state to go on from and without, trials, wrong ones."""
    found = {}
    for name in (*STAGES, "all"):
        mine = [row for row in rows if name in (row["stage"], "all")]
        if mine:
            found[name] = {key: sum(row[key] for row in mine) for key in COUNTS}
            found[name] |= {"trials": len(mine), "wrong": sum(bool(row["wrong"]) for row in mine)}
    return found


def record(options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> None:
    from benchmarks.reference.evaluate import environment  # now that no child is forked any more
    from benchmarks.speed.timing import commit

    about = {"benchmark": "kill_test", "commit": commit(), **environment(), "seed": options.seed}
    about |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": round(seconds)}
    forced, changed = (sum(row[key] for row in rows) for key in ("force", "changed"))
    about |= {"replacing": forced, "with_another_option": changed, "may_differ": list(LEFT_OUT)}
    about["left_out"] = sorted({name for row in rows for name in row["left_out"]})
    with options.record.open("a", encoding="ascii") as stream:
        stream.write(json.dumps(about | {"stages": counts(rows)}) + "\n")


def main(given: Sequence[str] | None = None, command: Callable[[], object] = locum_command) -> int:
    """Kill a command that reads sys.argv; 1 where anything is wrong."""
    options = arguments(given)
    out, began = options.out.absolute(), time.monotonic()
    print(f"sources {Path(locum.__file__).parent}, seed {options.seed}, in {out}")
    campaign = Campaign(command, out, options.seed, options.stages, keep=options.only is not None)
    if options.only is not None:
        row = campaign.show(options.only)
        print(json.dumps(row, indent=1))
        return int(bool(row["wrong"]))
    rows = campaign.run(options.count, options.resume)
    for name, numbers in counts(rows).items():
        print(f"{name:20} " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items()))
    for row in rows:
        for wrong in row["wrong"]:
            print(f"trial {row['number']}, {row['stage']}: {wrong}")
    if options.record is not None:
        record(options, rows, time.monotonic() - began)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
