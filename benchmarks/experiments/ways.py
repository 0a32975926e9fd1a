"""Ways of recovery compared at equal tokens: LoRA, annealing and layer-wise distillation of the same compressed models.

    python -m benchmarks.experiments.ways select [--steps 100]     learning rates, on validation
    python -m benchmarks.experiments.ways test   [--steps 100]     the best of them, three seeds, on test
    python -m benchmarks.experiments.ways join | table

Every job is `compress`, `recover` and `eval` with their defaults but for the way, the rate and the steps. A seed is that of
calibration, plan and training. Text and splits are those of defaults.py. Pruning at random, with LoRA, is the baseline.
Memory and seconds are the training's own: tensors on a GPU, or the process. A job that is in the results is not run again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import locum
from benchmarks.experiments.defaults import MEASURED, cells, command, compress, place, recover, short, write
from benchmarks.experiments.experiment import RESULTS, SEEDS, read
from locum.bundled import MODEL, reference_data

ARMS = (
    ("lightmoe", "lora"),
    ("lightmoe", "annealed"),
    ("lightmoe", "layerwise"),
    ("lightmoe", "kd"),
    ("decompose", "lora"),
    ("decompose", "layerwise"),
    ("decompose", "kd"),
    ("prune, random", "lora"),
)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # the lowest for the arms whose best of the others was the lowest
SPENT = ("seconds", "peak_bytes", "trainable_parameters", "kept_step")


def file_of(phase: str) -> Path:
    return RESULTS / f"ways_{phase}.jsonl"


def select(steps: int, shard: tuple[int, int]) -> None:
    """Validation loss after training, by rate, seed 0."""
    file = file_of("selection")
    done = {(row["method"], row["how"], row["learning_rate"], row["steps"]) for row in read(file)}
    jobs = [(*arm, rate) for rate in RATES for arm in ARMS]
    for name, how, rate in jobs[shard[0] :: shard[1]]:
        if (name, how, rate, steps) in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            small = compress(name, 0, Path(scratch) / "small")
            made = recover(small, Path(scratch) / "out", how, 0, steps, learning_rate=rate)
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
        rate = rates[name, how]
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as scratch:
            small = compress(name, seed, Path(scratch) / "small")
            made = recover(small, Path(scratch) / "out", how, seed, steps, learning_rate=rate)
            about = {"method": name, "how": how, "seed": seed, "steps": steps, "learning_rate": rate} | place()
            about |= {key: made[key] for key in SPENT}
            for stage, model in (("before", small), ("after", Path(scratch) / "out")):
                given = {"against": MODEL, "tokens": MEASURED, "name": name, "seed": seed}
                measured = locum.evaluate(model, data=reference_data(), **given)
                rows += [about | {"stage": stage} | row for row in map(short, measured) if row["model"] != "original"]
        write(file, shard, rows)
        print(name, how, seed, rate, made["seconds"], flush=True)


def table(steps: int) -> str:
    """Means over seeds, and of what the training took."""
    rows = [row for row in read(file_of("test")) if row["steps"] == steps]
    lines = [
        "| method | way | rate | trained | loss above the original, before | after | KL, before | after | seconds | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, how in ARMS:
        mine = [row for row in rows if (row["method"], row["how"]) == (name, how)]
        if not mine:
            continue
        runs = list({row["seed"]: row for row in mine}.values())
        seconds, memory = (sum(run[key] for run in runs) / len(runs) for key in ("seconds", "peak_bytes"))
        told = [name, how, f"{mine[0]['learning_rate']:g}", f"{mine[0]['trainable_parameters']:,}"]
        told += [*cells(mine, "loss_delta"), *cells(mine, "kl"), f"{seconds:.0f}", f"{memory / 2**20:.0f} MiB"]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, 100, {"select": select, "test": test}, map(file_of, ("selection", "test")), table)
