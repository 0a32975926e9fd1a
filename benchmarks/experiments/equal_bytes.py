"""Methods in few bits at equal bytes: what is lost where experts may take 4.5 to 1.5 bits per original weight, all told.

    python -m benchmarks.experiments.equal_bytes select    how many bits each method takes at each size, on validation
    python -m benchmarks.experiments.equal_bytes test      every method at every size, three seeds, on test
    python -m benchmarks.experiments.equal_bytes table     (`make bits` is all three)

A size is that of all routed experts with what stands in for them, scales included, per weight of the original's. The full model in
few bits is a row where some number of bits has that size. Text is the bundled one, which the reference model never saw in training:
statistics are of the train split of six domains, figures of the test split, of these domains and of the two that calibration
never saw. A seed is that of calibration. Original and compressed models see the same tokens in the same run, so intervals of
`loss_delta` are paired. What a method cannot do is a row with its reason. A job that is in the results already is not run again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import locum
from benchmarks.experiments.defaults import command, file_named, place, short, write
from benchmarks.experiments.experiment import SEEDS, made_once, read
from locum.bundled import MODEL, reference_data
from locum.checkpoints.skeleton import read_shape
from locum.errors import PlanError

SIZES = (4.5, 3.5, 3.0, 2.5, 2.0, 1.5)
COSTS = {"16": 16.0, "8": 8.5, "4": 4.5, "3": 3.5, "2": 3.0}  # bits per weight of groups of 32, scales included
UNSEEN = ("math", "plays")
CALIBRATED, MEASURED = 32768, {"validation": 8192, "test": 16384}  # tokens
RANDOM = "pruned, random"
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "prune"},
    "pruned, REAP": {"method": "prune", "score": "reap"},
    "pruned, frequency": {"method": "prune", "score": "frequency"},
    RANDOM: {"method": "prune", "score": "random"},
    "constants": {"method": "mone"},
    "low rank": {"method": "decompose"},
    "base + adapter": {"method": "lightmoe"},
}


def sources(seen: bool) -> list[str]:
    return [word for word in reference_data() if (word.partition("=")[0] not in UNSEEN) == seen]


def calibrate(model: Path, data: list[str], out: Path, **asked: Any) -> Path:
    return locum.calibrate(model, data=sources(seen=True), out=out, **asked)


def bits_for(method: str, size: float) -> list[str]:
    """Numbers of bits that a method may take at a size: those in which the full model is larger, or just as large."""
    if method == "full":
        return [bits for bits, cost in COSTS.items() if cost == size]
    return [bits for bits, cost in COSTS.items() if size < cost <= 5 * size]


def measure(method: str, size: float, bits: str, seed: int, split: str) -> list[dict[str, Any]]:
    """One model, made and measured; a row with the reason where the method cannot make it."""
    about = {"method": method, "size": size, "bits": bits, "seed": seed, "tokens": CALIBRATED} | place()
    statistics = made_once("seen-statistics", calibrate, tokens=CALIBRATED, seed=seed)
    shape = read_shape(MODEL)
    fit = shape.bytes - shape.bytes_of_experts + int(size * shape.expert_parameters / 8)
    asked = (
        METHODS[method] | ({} if bits == "16" else {"bits": bits}) | ({} if method == "full" else {"fit": f"{fit}B"})
    )
    with tempfile.TemporaryDirectory() as scratch:
        plan, out, started = Path(scratch) / "plan.json", Path(scratch) / "few", time.perf_counter()
        try:
            locum.plan([statistics], out=plan, **asked)
        except PlanError as error:
            return [about | {"refused": str(error)}]
        locum.apply(MODEL, plan=plan, statistics=statistics, out=out, seed=seed)
        about |= {"bytes": read_shape(out).bytes, "seconds": round(time.perf_counter() - started, 1)}
        rows = []
        for domains in ("seen", "unseen") if split == "test" else ("seen",):
            data = sources(seen=domains == "seen")
            asked = {"tokens": MEASURED[split], "split": split, "name": method, "seed": seed}
            measured = map(short, locum.evaluate(out, data=data, against=MODEL, **asked))
            wanted = [row for row in measured if row["domain"] == "all" and row["model"] != "original"]
            rows += [about | {"domains": domains} | row for row in wanted if row["metric"] in ("loss_delta", "kl")]
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["size"], row["bits"], row["seed"]


def run(split: str, jobs: list[tuple[str, float, str, int]], shard: tuple[int, int]) -> None:
    file = file_of(split)
    done = {key(row) for row in read(file)}
    for job in jobs[shard[0] :: shard[1]]:
        if job not in done:
            rows = measure(*job, split)
            write(file, shard, rows)
            told = [f"{row['domains']} {row['metric']} {row['value']:.4f}" for row in rows if "value" in row]
            print(*job, *(told or [rows[0]["refused"]]), flush=True)


def file_of(split: str) -> Path:
    return file_named(f"equal_bytes_{'selection' if split == 'validation' else split}")


def select(steps: int, shard: tuple[int, int]) -> None:
    """Bits by size, seed 0. Frequency and random pruning take those of REAP."""
    methods = [method for method in METHODS if method not in ("full", "pruned, frequency", RANDOM)]
    jobs = [(method, size, bits, 0) for size in SIZES for method in methods for bits in bits_for(method, size)]
    run("validation", jobs, shard)


def chosen(method: str, size: float) -> list[str]:
    """The bits with the lowest validation loss, or none where nothing could be made."""
    if method == "full":
        return bits_for(method, size)
    of = "pruned, REAP" if method in ("pruned, frequency", RANDOM) else method
    rows = [row for row in read(file_of("validation")) if (row["method"], row["size"]) == (of, size)]
    tried = {row["bits"]: row["value"] for row in rows if row.get("metric") == "loss_delta"}
    return [min(tried, key=tried.__getitem__)] if tried else []


def test(steps: int, shard: tuple[int, int]) -> None:
    of = [(method, size, bits) for size in SIZES for method in METHODS for bits in chosen(method, size)]
    run("test", [(*job, seed) for seed in SEEDS for job in of], shard)


def cells(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Means over seeds and the widest of their intervals: loss and KL on seen domains, then on unseen ones."""
    for domains in ("seen", "unseen"):
        for metric in ("loss_delta", "kl"):
            mine = [row for row in rows if (row.get("domains"), row.get("metric")) == (domains, metric)]
            low, high = min(row["low"] for row in mine), max(row["high"] for row in mine)
            yield f"{sum(row['value'] for row in mine) / len(mine):.4f} ({low:.4f} to {high:.4f})"


def table(steps: int) -> str:
    lines = [
        "| bits a weight | method | in bits | seeds | loss above the original, seen domains | KL | unseen domains | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = read(file_of("test"))
    for size, method in ((size, method) for size in SIZES for method in METHODS):
        mine = [row for row in rows if (row["size"], row["method"]) == (size, method) and "value" in row]
        if mine:
            seeds = len({row["seed"] for row in mine})
            lines.append(f"| {size} | {method} | {mine[0]['bits']} | {seeds} | {' | '.join(cells(mine))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, 0, {"select": select, "test": test}, map(file_of, ("validation", "test")), table)
