"""Every way to make experts small at equal bytes: what is lost where they take 8 to 1.5 bits per original weight, all told.

    python -m benchmarks.experiments.equal_bytes select     how many bits each method takes at each size, on validation
    python -m benchmarks.experiments.equal_bytes test       every method at every size, three seeds, on test
    python -m benchmarks.experiments.equal_bytes recover    the same after training, whose rate is chosen on validation
    python -m benchmarks.experiments.equal_bytes table      (`make bits` is all four)
    ... --model smolmoe                                     on SmolMoE, where `make smolmoe` has built it

A size is that of all routed experts with what stands in for them, scales included, per weight of the original's. The full model in
few bits is a row where some number of bits has that size. `auto` decides bits, ranks, columns and bases itself; beside it are the same
from costs of other experts and of chance, which say what its choice is worth. Statistics, searches and training are of the train split
of six domains, figures of the test split, of these domains and of the two that nothing before had seen. A seed is that of
calibration, search and training. Training is of routers alone, towards what the original predicts (`router-kd`), since it adds no bytes.
Models are compared with the original on the same tokens, so intervals of `loss_delta` are paired. What a method cannot do is a row
with its reason. A job that is in the results already is not run again.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.defaults import file_named, join, place, short, write
from benchmarks.experiments.experiment import SEEDS, made_once, read
from benchmarks.smolmoe.build import PRESETS, cached_model
from benchmarks.smolmoe.dense import smolmoe_folder
from benchmarks.smolmoe.text import write_files
from locum.bundled import MODEL, reference_data
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.checkpoints.skeleton import read_shape
from locum.data.tokens import load_tokens
from locum.errors import LocumError, PlanError
from locum.measure.loss import Output, block_sums, rows_of
from locum.plans.plan import Plan

SUBJECTS = ("reference", "smolmoe")
SIZES = (8.0, 4.5, 3.5, 3.0, 2.5, 2.0, 1.5)
COSTS = {"16": 16.0, "8": 8.5, "4": 4.5, "3": 3.5, "2": 3.0}  # bits per weight of groups of 32, scales included
UNSEEN = ("math", "plays")
MEASURED = {"validation": 8192, "test": 8192}  # tokens, of each kind of domains
LENGTH, BATCH = 256, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, OF_RATES = 20, 2.5  # of training; rates are chosen at one size
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RANDOM, AUTO = "pruned, random", "auto"
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "prune"},
    "pruned, REAP": {"method": "prune", "score": "reap"},
    "pruned, frequency": {"method": "prune", "score": "frequency"},
    RANDOM: {"method": "prune", "score": "random"},
    "constants": {"method": "mone"},
    "low rank": {"method": "decompose"},
    "base + adapter": {"method": "lightmoe"},
    AUTO: {"method": "auto"},
    "auto, costs shuffled": {"method": "auto", "costs": "shuffled"},
    "auto, costs random": {"method": "auto", "costs": "random"},
}
CHOOSES = tuple(name for name, asked in METHODS.items() if asked["method"] == "auto")  # their bits themselves


@dataclass(frozen=True)
class Subject:
    """A model, its text, and how much of it is read."""

    name: str
    folder: Path
    data: tuple[str, ...]
    dtype: torch.dtype
    searched: tuple[tuple[str, Any], ...]  # options of the search

    def sources(self, seen: bool) -> list[str]:
        return [word for word in self.data if (word.partition("=")[0] not in UNSEEN) == seen]

    def statistics(self, seed: int) -> Path:
        """Of one search, which all methods read."""

        def searched(model: Path, data: list[str], out: Path, **asked: Any) -> None:
            locum.search(self.folder, method="auto", data=self.sources(seen=True), out=out, **asked)

        return made_once(f"searched-{self.folder.name}", searched, seed=seed, **dict(self.searched))

    def bytes_for(self, size: float) -> int:
        shape = read_shape(self.folder)
        return shape.bytes - shape.bytes_of_experts + int(size * shape.expert_parameters / 8)


@functools.cache
def subject(name: str) -> Subject:
    """Raises LocumError for a model that was not built."""
    if name == "reference":
        return Subject(name, MODEL, tuple(reference_data()), torch.float32, (("tokens", 32768), ("sample", 2048)))
    recipe = PRESETS["default"]
    folder = cached_model(recipe)
    if not folder.is_dir():
        raise LocumError(f"{name} is not there; build it with make smolmoe")
    text = write_files(smolmoe_folder() / "text", list(recipe.domains))
    return Subject(name, folder, tuple(text), torch.bfloat16, (("tokens", 16384), ("sample", 512), ("price", "noise")))


def bits_for(method: str, size: float) -> list[str]:
    """Numbers of bits that a method may take at a size: those in which the full model is larger, or just as large."""
    if method in CHOOSES:
        return ["own"]
    if method == "full":
        return [bits for bits, cost in COSTS.items() if cost == size]
    return [bits for bits, cost in COSTS.items() if size < cost <= 5 * size]


def plan_of(
    of: Subject, method: str, size: float, bits: str, statistics: Any, seed: int, out: Path | None = None
) -> Plan:
    asked = dict(METHODS[method])
    if "costs" in asked:
        asked["draw"] = seed
    if bits not in ("16", "own"):
        asked["bits"] = bits
    if method != "full":
        asked["fit"] = f"{of.bytes_for(size)}B"
    return locum.plan([statistics], out=out, **asked)


class Meter:
    """Text to measure on, and what the original says of it, which is asked once."""

    def __init__(self, of: Subject, split: str) -> None:
        self._original = load_model(of.folder, dtype=of.dtype, device=DEVICE)
        kinds = ("seen", "unseen") if split == "test" else ("seen",)
        cut = {"split": split, "tokens": MEASURED[split], "length": LENGTH, "keep_partial": True}
        tokenizer = load_tokenizer(of.folder)
        self._blocks = {kind: load_tokens(of.sources(kind == "seen"), tokenizer, **cut) for kind in kinds}
        self._outputs: dict[str, list[Output]] = {kind: [] for kind in kinds}

    def rows(self, model: Any, name: str, seed: int) -> Iterator[dict[str, Any]]:
        """Loss and KL of all domains, of those that calibration saw and of the others."""
        for kind, blocks in self._blocks.items():
            kept = self._outputs[kind]
            sums_BY = block_sums(model, blocks, against=self._original, batch_size=BATCH, of_original=kept)
            given = {"compared": True, "batch_size": BATCH, "seed": seed, "resamples": 1000, "model_name": name}
            rows = rows_of(
                sums_BY, blocks, against_name="original", plan=None, provenance={}, seconds=0.0, peak=None, **given
            )
            for row in map(short, rows):
                if row["domain"] == "all" and row["model"] != "original" and row["metric"] in ("loss_delta", "kl"):
                    yield {"domains": kind, **row}


@functools.cache
def meter(of: Subject, split: str) -> Meter:
    return Meter(of, split)


def measure(of: Subject, method: str, size: float, bits: str, seed: int, split: str) -> list[dict[str, Any]]:
    """One model, made and measured; a row with the reason where the method cannot make it."""
    about = {"subject": of.name, "method": method, "size": size, "bits": bits, "seed": seed} | place()
    statistics, started = locum.load_statistics(of.statistics(seed)), time.perf_counter()
    try:
        plan = plan_of(of, method, size, bits, statistics, seed)
    except PlanError as error:
        return [about | {"refused": str(error)}]
    model = apply_plan(load_model(of.folder, dtype=of.dtype, device=DEVICE), plan, statistics, seed)
    about |= {"bytes": plan.size(read_shape(of.folder)).bytes, "seconds": round(time.perf_counter() - started, 1)}
    about |= {"predicted_kl": plan.provenance["auto"]["predicted_kl"]} if method == AUTO else {}
    return [about | row for row in meter(of, split).rows(model, method, seed)]


def train(of: Subject, method: str, size: float, bits: str, seed: int, rate: float, split: str) -> list[dict[str, Any]]:
    """One model, made, trained and measured."""
    about = {"subject": of.name, "method": method, "size": size, "bits": bits, "seed": seed, "rate": rate} | place()
    statistics = locum.load_statistics(of.statistics(seed))
    with tempfile.TemporaryDirectory() as scratch:
        plan, small, out = (Path(scratch) / name for name in ("plan.json", "small", "out"))
        plan_of(of, method, size, bits, statistics, seed, plan)
        locum.apply(of.folder, plan=plan, statistics=of.statistics(seed), out=small, seed=seed)
        asked = {
            "steps": STEPS,
            "learning_rate": rate,
            "batch_size": 4,
            "length": LENGTH,
            "validate_every": 0,
            "seed": seed,
        }
        data = of.sources(seen=True)
        made = locum.recover(
            small, data=data, original=of.folder, out=out, how="router-kd", validation_tokens=4096, **asked
        )
        about |= {"bytes": read_shape(out).bytes, "seconds": round(made["seconds"], 1)}
        return [
            about | row for row in meter(of, split).rows(load_model(out, dtype=of.dtype, device=DEVICE), method, seed)
        ]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["subject"], row["method"], row["size"], row["bits"], row["seed"], row.get("rate")


def run(of: Subject, phase: str, split: str, jobs: Iterable[tuple[Any, ...]], shard: tuple[int, int]) -> None:
    """Jobs of method, size, bits and seed, and of a rate where they are to be trained."""
    file = file_of(phase)
    done = {key(row) for row in read(file)}
    for job in list(jobs)[shard[0] :: shard[1]]:
        if (of.name, *job, *([None] if len(job) == 4 else [])) not in done:
            rows = measure(of, *job, split) if len(job) == 4 else train(of, *job, split)
            write(file, shard, rows)
            told = [f"{row['domains']} {row['metric']} {row['value']:.4f}" for row in rows if "value" in row]
            print(*job, *(told or [rows[0]["refused"]]), flush=True)


def file_of(phase: str) -> Path:
    return file_named(f"equal_bytes_{phase}")


def select(of: Subject, shard: tuple[int, int]) -> None:
    """Bits by size, seed 0. Frequency and random pruning take those of REAP."""
    same = ("full", "pruned, frequency", RANDOM, *CHOOSES)
    jobs = [
        (method, size, bits, 0)
        for size in SIZES
        for method in METHODS
        if method not in same
        for bits in bits_for(method, size)
    ]
    run(of, "selection", "validation", jobs, shard)


def best(phase: str, of: Subject, which: str, **where: Any) -> list[Any]:
    """The value of a field with the lowest KL among the rows of a phase, or none where there are no such rows."""
    rows = [row for row in read(file_of(phase)) if {"subject": of.name, **where}.items() <= row.items()]
    tried = {row[which]: row["value"] for row in rows if row.get("metric") == "kl"}
    return [min(tried, key=tried.__getitem__)] if tried else []


def chosen(of: Subject, method: str, size: float) -> list[str]:
    """The bits with the lowest KL on validation, or none where nothing could be made."""
    if method == "full" or method in CHOOSES:
        return bits_for(method, size)
    return best(
        "selection", of, "bits", method="pruned, REAP" if method in ("pruned, frequency", RANDOM) else method, size=size
    )


def of_test(of: Subject) -> list[tuple[str, float, str, int]]:
    """Every method at every size, a whole table of one seed before the next."""
    return [(m, size, bits, seed) for seed in SEEDS for size in SIZES for m in METHODS for bits in chosen(of, m, size)]


def test(of: Subject, shard: tuple[int, int]) -> None:
    run(of, "test", "test", of_test(of), shard)


def recover(of: Subject, shard: tuple[int, int]) -> None:
    """Rates first, on validation, at one size; then everything that `test` could make."""
    refused = {key(row) for row in read(file_of("test")) if "refused" in row}
    jobs = [job for job in of_test(of) if (of.name, *job, None) not in refused]
    tried = [(*job, rate) for job in jobs if job[1] == OF_RATES and job[3] == 0 for rate in RATES]
    run(of, "rates", "validation", tried, shard)
    whole = [(*job, rate) for job in jobs for rate in trained_at(of, job[0])]
    run(of, "recovered", "test", sorted(whole, key=lambda job: job[3]), shard)


def trained_at(of: Subject, method: str) -> list[float]:
    """The rate that was chosen; that of random pruning where a method could not be made at the size of the choice."""
    return best("rates", of, "rate", method=method) or best("rates", of, "rate", method=RANDOM)


def cells(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Means over seeds and the widest of their intervals: loss and KL on seen domains, then on unseen ones."""
    for domains in ("seen", "unseen"):
        for metric in ("loss_delta", "kl"):
            mine = [row for row in rows if (row.get("domains"), row.get("metric")) == (domains, metric)]
            low, high = min(row["low"] for row in mine), max(row["high"] for row in mine)
            yield f"{sum(row['value'] for row in mine) / len(mine):.4f} ({low:.4f} to {high:.4f})"


def table(of: Subject) -> str:
    lines = [
        "| bits a weight | method | in bits | trained | seeds | loss above the original, seen domains | KL | unseen domains | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    stages = {"no": read(file_of("test")), "routers": read(file_of("recovered"))}
    for size, method in ((size, method) for size in SIZES for method in METHODS):
        for trained, rows in stages.items():
            wanted = {"subject": of.name, "size": size, "method": method}
            rates = [None] if trained == "no" else trained_at(of, method)
            mine = [r for r in rows if wanted.items() <= r.items() and "value" in r and r.get("rate") in rates]
            if mine:
                told = [f"{size:g}", method, mine[0]["bits"], trained, str(len({row["seed"] for row in mine}))]
                lines.append(f"| {' | '.join([*told, *cells(mine)])} |")
    return "\n".join(lines)


PHASES = {"select": select, "test": test, "recover": recover}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=(*PHASES, "join", "table"))
    parser.add_argument("--model", choices=SUBJECTS, default="reference")
    parser.add_argument("--shard", default="0/1", help="this process's part of the jobs, such as 0/2")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    index, count = map(int, arguments.shard.split("/"))
    if arguments.phase == "table":
        print(table(subject(arguments.model)))
    elif arguments.phase == "join":
        for phase in ("selection", "test", "rates", "recovered"):
            join(file_of(phase))
    else:
        PHASES[arguments.phase](subject(arguments.model), (index, count))


if __name__ == "__main__":
    main()
