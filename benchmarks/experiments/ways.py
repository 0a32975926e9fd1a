"""Ways of recovery compared at equal tokens, on the same compressed models.

    python -m benchmarks.experiments.ways select [--steps 20]     learning rates, on validation
    python -m benchmarks.experiments.ways test   [--steps 20]     the best of them, three seeds, on test
    python -m benchmarks.experiments.ways join | table [--steps 100]

Every job is `compress`, `recover` and `eval` with their defaults but for the way, the rate and the steps. A seed is that of
calibration, plan and training. Text and splits are those of defaults.py. Memory and seconds are the training's own; memory is told
where it is that of tensors on a GPU, a process that does several jobs has no such number. The rows of 100 steps are of a GPU. Left out
are the ways that need a routing policy (vectors, seer), which the plan has none of, and `esft`, which is for a task of its own (esft.py).
A job that is in the results is not run again.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import locum
from benchmarks.experiments.defaults import MEASURED, cells, command, compress, place, recover, short, write
from benchmarks.experiments.experiment import RESULTS, SEEDS, read
from locum.bundled import MODEL, reference_data

LOW, HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
ARMS: dict[tuple[str, str], tuple[float, ...]] = {  # with the rates tried
    ("lightmoe", "lora"): (*LOW, 1e-2),
    ("lightmoe", "kd"): (1e-4, *LOW),
    ("lightmoe", "layerwise"): (*LOW, 1e-2),
    ("lightmoe", "full"): (1e-4, *LOW),
    ("lightmoe", "experts"): (1e-4, *LOW),
    ("lightmoe", "router"): HIGH,
    ("lightmoe", "router-kd"): HIGH,
    ("lightmoe", "smola"): HIGH,
}
BEFORE = (
    ("lightmoe", "annealed"),
    ("decompose", "lora"),
    ("decompose", "kd"),
    ("prune, random", "lora"),
)  # of 100 steps alone
BLOCKS = {100: 8}  # of 256 tokens in a step; else 4
SPENT = ("tokens", "seconds", "processor_seconds", "peak_bytes", "trainable_parameters", "kept_step")
METRICS = ("loss", "loss_delta", "kl", "top1_agreement")
ENDS = {"validation_tokens": 4096, "validate_every": 0, "force": True}


@functools.cache
def scratch() -> Path:
    place = tempfile.TemporaryDirectory()
    atexit.register(place.cleanup)
    return Path(place.name)


@functools.cache
def small(name: str, seed: int) -> Path:
    """The compressed model that all ways begin with."""
    return compress(name, seed, scratch() / f"{name}-{seed}")


def train(name: str, how: str, rate: float, seed: int, steps: int, out: Path) -> dict[str, Any]:
    model, begin = small(name, seed), time.process_time()
    made = recover(model, out, how, seed, steps, learning_rate=rate, batch_size=BLOCKS.get(steps, 4), **ENDS)
    return made | {"processor_seconds": time.process_time() - begin}


@functools.cache
def measured(model: Path, name: str, seed: int) -> list[dict[str, Any]]:
    given = {"against": MODEL, "tokens": MEASURED, "name": name, "seed": seed}
    rows = map(short, locum.evaluate(model, data=reference_data(), **given))
    return [row for row in rows if row["model"] != "original" and row["metric"] in METRICS]


def file_of(phase: str) -> Path:
    return RESULTS / f"ways_{phase}.jsonl"


def select(steps: int, shard: tuple[int, int]) -> None:
    """Validation loss after training, by rate, seed 0."""
    file = file_of("selection")
    done = {(row["method"], row["how"], row["learning_rate"], row["steps"]) for row in read(file)}
    jobs = [(*arm, rate) for arm, rates in ARMS.items() for rate in rates]
    for name, how, rate in jobs[shard[0] :: shard[1]]:
        if (name, how, rate, steps) in done:
            continue
        made = train(name, how, rate, 0, steps, scratch() / "out")
        row = {"method": name, "how": how, "learning_rate": rate, "steps": steps, "seed": 0} | place()
        row |= {key: made[key] for key in ("validation_loss_before", "validation_loss", *SPENT)}
        write(file, shard, [row])
        print(json.dumps(row), flush=True)


def chosen(steps: int) -> dict[tuple[str, str], float]:
    """The rate with the lowest validation loss, by method and way."""
    rows = [row for row in read(file_of("selection")) if row["steps"] == steps]
    best = {arm: [row for row in rows if (row["method"], row["how"]) == arm] for arm in ARMS}
    return {arm: min(of, key=lambda row: row["validation_loss"])["learning_rate"] for arm, of in best.items() if of}


def test(steps: int, shard: tuple[int, int]) -> None:
    """Every method and way before and after, three seeds."""
    file, rates = file_of("test"), chosen(steps)
    done = {(row["method"], row["how"], row["seed"], row["steps"]) for row in read(file)}
    jobs = [(*arm, seed) for seed in SEEDS for arm in ARMS]
    for name, how, seed in jobs[shard[0] :: shard[1]]:
        if (name, how, seed, steps) in done:
            continue
        rate, out = rates[name, how], scratch() / f"{name}-{how}-{seed}"
        made = train(name, how, rate, seed, steps, out)
        about = {"method": name, "how": how, "seed": seed, "steps": steps, "learning_rate": rate} | place()
        about |= {key: made[key] for key in SPENT}
        stages = {"before": measured(small(name, seed), name, seed), "after": measured(out, name, seed)}
        rows = [about | {"stage": stage} | row for stage, found in stages.items() for row in found]
        shutil.rmtree(out)
        write(file, shard, rows)
        print(name, how, seed, rate, made["seconds"], flush=True)


def table(steps: int) -> str:
    """Means over seeds, and of what the training took."""
    rows = [row for row in read(file_of("test")) if row["steps"] == steps]
    lines = [
        "| method | way | rate | trained | loss above the original, before | after | KL, before | after | seconds | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, how in (*ARMS, *BEFORE):
        mine = [row for row in rows if (row["method"], row["how"]) == (name, how)]
        if not mine:
            continue
        runs = list({row["seed"]: row for row in mine}.values())
        taken = "seconds" if all(run["gpu"] for run in runs) else "processor_seconds"  # others ran beside it
        seconds, memory = (sum(run[key] for run in runs) / len(runs) for key in (taken, "peak_bytes"))
        told_memory = f"{memory / 2**20:.0f} MiB" if all(run["gpu"] for run in runs) else ""
        told = [name, how, f"{mine[0]['learning_rate']:g}", f"{mine[0]['trainable_parameters']:,}"]
        told += [*cells(mine, "loss_delta"), *cells(mine, "kl"), f"{seconds:.0f}", told_memory]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, 20, {"select": select, "test": test}, map(file_of, ("selection", "test")), table)
