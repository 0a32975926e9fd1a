"""Damaged inputs in great number, and what Locum answers to each.

    PYTHONPATH=tests python -m fuzzing [--count 1200] [--seed 0] [--kinds plan,options] [--out build/fuzz] [--jobs 2]
    PYTHONPATH=tests python -m fuzzing --resume --count 1200    what is missing of these in the folder, of a run that ended early
    PYTHONPATH=tests python -m fuzzing --seed 0 --only 417      one input: what it is, what is said, its folder kept

Every input is made from the seed and its number: a copy of a small world of files (world.py) in which one thing is
damaged, and a command that reads it (kinds.py); or a command line with a senseless value (values.py). The command runs in
a child of its own under limits (process.py). Its answer is a clear error (exit code 2, one line), an acceptance, with the
same result as without the damage or another one, or a fault: anything else (answers.py). Exit code 1 where there are any.

`--record FILE` adds a line with the counts to a file of results; with `--resume --count 0` nothing is tried for it.

`--out` gets `answers.jsonl`, a row for each input, and `summary.md`, the tables that are printed. `--only` takes the world
of the last whole run that is there, so that it sees the same bytes; so does `--resume`, which adds to the answers that are
there. Pieces of a long run: the same command with `--resume` and ever larger counts.
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

import transformers.models.olmoe.modeling_olmoe  # noqa: F401 (every child would import it; datasets starts a thread)

import locum
from locum.cli import main as locum_command

from .campaign import Campaign
from .kinds import KINDS, OPTIONS
from .process import Limits
from .summary import counts, summary

ALL_KINDS = (*KINDS, OPTIONS)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzzing", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=1200, help="inputs to try")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the world and the answers in the folder, and go on")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="try this input alone, and show it")
    parser.add_argument("--kinds", default=",".join(ALL_KINDS), help=f"separated by commas: {', '.join(ALL_KINDS)}")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="folder for what is found")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a line with the counts to these results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="inputs tried at a time")
    parser.add_argument("--seconds", type=float, default=60, help="what takes longer hangs")
    parser.add_argument("--memory", type=float, default=4, help="GiB that are too much")
    options = parser.parse_args(given)
    options.kinds = options.kinds.split(",")
    if unknown := sorted({*options.kinds} - {*ALL_KINDS}):
        parser.error(f"unknown kind {unknown[0]!r}; allowed: {', '.join(ALL_KINDS)}")
    return options


def record(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add a line to a file of results: who tried which inputs, and the counts of what was answered."""
    from benchmarks.reference.evaluate import environment  # now that no child is forked any more
    from benchmarks.speed.timing import commit

    limits = {"seconds": options.seconds, "gibibytes": options.memory}
    made = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seed": options.seed, "limits": limits}
    about = {"benchmark": "fuzz", "commit": commit(), **environment(), **made, "inputs": len(rows)}
    with options.record.open("a", encoding="ascii") as stream:
        stream.write(json.dumps(about | {"answers": counts(rows)}) + "\n")


def main(given: Sequence[str] | None = None, command: Callable[[], object] = locum_command) -> int:
    """Try inputs on a command that reads sys.argv; 1 where a fault was found."""
    options = arguments(given)
    sys.stdout.reconfigure(errors="backslashreplace")  # inputs have names that no terminal can show
    limits = Limits(options.seconds, int(options.memory * 2**30))
    out = options.out.absolute()
    campaign = Campaign(command, out, limits, seed=options.seed, jobs=options.jobs)
    print(f"sources {Path(locum.__file__).parent}, seed {options.seed}, in {out}")
    if options.only is not None:
        return campaign.show(options.only)
    rows = campaign.run(options.first, options.count, options.kinds, resume=options.resume)
    text, faults = summary(rows), sum(row["fault"] for row in rows)
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    if options.record is not None:
        record(options, rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
