"""What users get who choose nothing: every method, at half of the experts if it can, before and after `--recover lora`.

    python -m benchmarks.experiments.defaults select [--steps 60]     learning rates and schedules, on validation
    python -m benchmarks.experiments.defaults test   [--steps 60]     every method with its default options, on test
    python -m benchmarks.experiments.defaults table  [--steps 60]

The commands' own functions run, with their defaults; `--steps` alone is another (the default is 300). Text is the
bundled one, which the reference model never saw in training: statistics and training on its train split, choices on its
validation split, figures on its test split. A seed is that of calibration, plan and training. Original and compressed
models see the same tokens in the same run, so intervals of `loss_delta` are paired. A job that is in the results already is
not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.experiment import RESULTS, SEEDS, made_once, read
from benchmarks.speed.timing import commit
from locum.bundled import MODEL, reference_data
from locum.methods import METHODS as REGISTERED
from locum.methods import TARGETED, SearchingMethod
from locum.stages.searching import to_collect

REMOVED = 0.5  # where a method can be asked for an amount
METHODS: dict[str, dict[str, Any]] = {
    "lightmoe": {"method": "lightmoe", "remove": REMOVED},
    "prune, REAP": {"method": "prune", "remove": REMOVED, "score": "reap"},
    "prune, random": {"method": "prune", "remove": REMOVED, "score": "random"},
    "decompose": {"method": "decompose", "remove": REMOVED},
    "mone": {"method": "mone", "remove": REMOVED},
    "replace": {"method": "replace", "remove": REMOVED},
    "compressed-experts": {"method": "compressed-experts"},
    "moe-i2": {"method": "moe-i2", "remove": REMOVED},
    "prune, frequency": {"method": "prune", "remove": REMOVED, "score": "frequency"},
}
METHODS |= {
    name: {"method": name, **({"remove": REMOVED} if REGISTERED[name].saves in TARGETED else {})}
    for name in sorted(REGISTERED)
    if name not in {asked["method"] for asked in METHODS.values()}
}
# The way, the method that stands for its use, the rates tried with a cosine, and those tried without a schedule.
TRIED = (
    ("lora", "prune, REAP", (3e-4, 1e-3, 3e-3), ()),
    ("lora", "decompose", (3e-4, 1e-3, 3e-3), (3e-4, 1e-3)),
    ("annealed", "lightmoe", (1e-4, 3e-4, 1e-3), (1e-3,)),
    ("layerwise", "lightmoe", (), (3e-4, 1e-3, 3e-3)),
    ("lora", "lightmoe", (1e-4, 3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3, 3e-3)),
)
CALIBRATED, VALIDATED, MEASURED = 65536, 16384, 8192  # tokens
WAY = "lora"


def file_named(name: str) -> Path:
    return RESULTS / f"{name}.jsonl"


def file_of(phase: str) -> Path:
    return file_named(f"defaults_{phase}")


def compress(name: str, seed: int, out: Path) -> Path:
    """One method with its default options, from calibration (or a search) with this seed."""
    asked = {"tokens": CALIBRATED, "seed": seed}
    options: dict[str, Any] = {"data": reference_data(), **asked}
    chosen = REGISTERED[METHODS[name]["method"]]()
    if isinstance(chosen, SearchingMethod):
        options["statistics"] = made_once("searched", locum.search, method=chosen.name, **asked)
    elif chosen.needs():
        options["statistics"] = made_once("statistics", locum.calibrate, also=collected(), **asked)
    return locum.compress(MODEL, out=out, **options, **METHODS[name])


def collected() -> list[str]:
    """What calibration gives to all methods here, so that one file serves them."""
    methods = [REGISTERED[asked["method"]]() for asked in METHODS.values()]
    return sorted({need for one in methods if not isinstance(one, SearchingMethod) for need in to_collect(one)})


def recover(small: Path, out: Path, how: str, seed: int, steps: int, **options: Any) -> dict[str, Any]:
    data = reference_data()
    more = {"validation_tokens": VALIDATED, "validate_every": max(steps // 2, 1), **options}
    return locum.recover(small, data=data, original=MODEL, out=out, how=how, steps=steps, seed=seed, **more)


def select(steps: int, shard: tuple[int, int]) -> None:
    """Validation loss before and after, by rate and schedule, seed 0."""
    jobs = [
        (how, name, rate, schedule)
        for how, name, with_cosine, constant in TRIED
        for schedule, rates in (("cosine", with_cosine), ("constant", constant))
        for rate in rates
    ]
    file = file_of("selection")
    done = {tuple(row[k] for k in ("how", "method", "learning_rate", "schedule")) for row in read(file)}
    for how, name, rate, schedule in jobs[shard[0] :: shard[1]]:
        if (how, name, rate, schedule) in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            small = compress(name, 0, Path(scratch) / "small")
            tried = {"learning_rate": rate, "schedule": schedule}
            made = recover(small, Path(scratch) / "out", how, 0, steps, **tried)
        row = {"how": how, "method": name, **tried, "steps": steps, "seed": 0} | place()
        keys = ("validation_loss_before", "validation_loss", "kept_step", "loss", "seconds")
        write(file, shard, [row | {key: made[key] for key in keys}])
        print(json.dumps(row | {"after": made["validation_loss"], "kept": made["kept_step"]}), flush=True)


def test(steps: int, shard: tuple[int, int]) -> None:
    """Every method before and after, three seeds."""
    jobs = [(name, seed) for name in METHODS for seed in SEEDS]
    file = file_of("test")
    done = {(row["method"], row["seed"], row["steps"]) for row in read(file)}
    for name, seed in jobs[shard[0] :: shard[1]]:
        if (name, seed, steps) in done:
            continue
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as scratch:
            small = compress(name, seed, Path(scratch) / "small")
            made = recover(small, Path(scratch) / "out", WAY, seed, steps)
            for stage, model in (("before", small), ("after", Path(scratch) / "out")):
                measured = locum.evaluate(
                    model, data=reference_data(), against=MODEL, tokens=MEASURED, name=name, seed=seed
                )
                about = {"method": name, "seed": seed, "stage": stage, "steps": steps} | place()
                about |= {"training_seconds": made["seconds"], "kept_step": made["kept_step"]}
                rows += [
                    about | row for row in map(short, measured) if row["model"] != "original" or name == "lightmoe"
                ]
        write(file, shard, rows)
        print(name, seed, *(f"{r['stage']} {r['value']:.4f}" for r in rows if is_loss(r)), flush=True)


def place() -> dict[str, str | None]:
    return {"commit": commit(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def short(row: Any) -> dict[str, Any]:
    """A row of results without what is alike for all."""
    kept = {key: row.provenance[key] for key in ("parameters", "expert_parameters") if key in row.provenance}
    told = ("model", "metric", "domain", "value", "low", "high", "n")
    return {key: value for key, value in dataclasses.asdict(row).items() if key in told} | kept


def is_loss(row: dict[str, Any]) -> bool:
    return (row["metric"], row["domain"]) == ("loss", "all") and row["model"] != "original"


def write(file: Path, shard: tuple[int, int], rows: list[dict[str, Any]]) -> None:
    part = file if shard[1] == 1 else file.with_name(f"{file.stem}.{shard[0]}.jsonl")
    with part.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def cells(rows: list[dict[str, Any]], metric: str) -> Iterator[str]:
    """Mean over seeds and the widest of their intervals, before and after."""
    for stage in ("before", "after"):
        mine = [r for r in rows if (r["stage"], r["metric"], r["domain"]) == (stage, metric, "all")]
        if mine:
            low, high = min(r["low"] for r in mine), max(r["high"] for r in mine)
            yield f"{sum(r['value'] for r in mine) / len(mine):.3f} ({low:.3f} to {high:.3f})"


def table(steps: int) -> str:
    rows = [row for row in read(file_of("test")) if row["steps"] == steps]
    lines = [
        "| method | expert parameters | seeds | loss above the original, before | after | KL, before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        mine = [r for r in rows if r["method"] == name and r["model"] != "original"]
        if mine:
            seeds = len({r["seed"] for r in mine})
            told = [*cells(mine, "loss_delta"), *cells(mine, "kl")]
            lines.append(f"| {name} | {mine[0]['expert_parameters']:,} | {seeds} | {' | '.join(told)} |")
    return "\n".join(lines)


Phase = Callable[[int, tuple[int, int]], None]  # of steps and a shard


def command(
    about: str, steps: int, phases: Mapping[str, Phase], files: Iterable[Path], table: Callable[[int], str]
) -> None:
    """The command line of an experiment: its phases, and joining and showing what they wrote."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=(*phases, "join", "table"))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--shard", default="0/1", help="this process's part of the jobs, such as 0/2")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    index, count = map(int, arguments.shard.split("/"))
    if arguments.phase == "table":
        print(table(arguments.steps))
    elif arguments.phase == "join":
        for file in files:
            join(file)
    else:
        phases[arguments.phase](arguments.steps, (index, count))


def join(file: Path) -> None:
    """One results file from the shards'."""
    rows = read(file)
    for part in RESULTS.glob(f"{file.stem}.*.jsonl"):
        part.unlink()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    command(__doc__, 300, {"select": select, "test": test}, map(file_of, ("selection", "test")), table)
