"""Expert-specialised tuning on one domain beside full and LoRA fine-tuning, at equal tokens: what it learns, forgets and stores.

    python -m benchmarks.experiments.esft select [--steps 40]     learning rates, on the domain's validation split
    python -m benchmarks.experiments.esft test   [--steps 40]     the best of them, three seeds, on test
    python -m benchmarks.experiments.esft join | table

The reference model learns the bundled text of one domain, which it never saw, by `recover` with its defaults but for the way, the
rate and the size of a batch. A seed is that of the tokens that experts are chosen by and of the training. Experts are chosen by the
paper's two scores at the paper's thresholds; as a baseline as many are chosen at random in every layer, by statistics whose counts
belong to other experts. Every model is measured on the test split of the domain and of the seven others, the original on the
same tokens in the same run, so intervals of `loss_delta` are paired. A job that is in the results is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.defaults import command, file_named, place, short, write
from benchmarks.experiments.experiment import SEEDS, made_once, read
from locum.bundled import MODEL, reference_data
from locum.checkpoints.weight_files import ADAPTER, shard_files
from locum.stats.statistics_file import save_statistics
from locum.stats.sums import Statistics

DOMAIN = "math"  # the one on which fine-tuning changes most: questions with a form of their own
ARMS: dict[str, dict[str, Any]] = {
    "full": {"how": "full"},
    "lora": {"how": "lora"},
    "esft, token": {"how": "esft", "score": "token", "threshold": 0.2},
    "esft, gate": {"how": "esft", "score": "gate", "threshold": 0.1},
    "esft, random": {"how": "esft", "score": "token", "threshold": 0.2},
    "esft, random, rate of token": {"how": "esft", "score": "token", "threshold": 0.2},
}
RATES: dict[str, tuple[float, ...]] = {
    "full": (3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "esft, token": (1e-3, 3e-3, 1e-2),
    "esft, gate": (1e-3, 3e-3, 1e-2, 3e-2),
    "esft, random": (1e-3, 3e-3, 1e-2, 3e-2),
}
COUNTED, BATCH = 32768, 4  # tokens that experts are chosen by; blocks of 256 tokens in a step
MEASURED = {"target": 8192, "others": 8192}  # tokens
VALIDATED = 2048  # tokens, in jobs of `test`, whose rate is chosen


def sources(of: str) -> list[str]:
    return [word for word in reference_data() if (word.partition("=")[0] == DOMAIN) == (of == "target")]


def calibrate(model: Path, data: list[str], out: Path, domain: str, **asked: Any) -> Path:
    return locum.calibrate(model, data=sources("target"), out=out, **asked)


def by_use(seed: int) -> Path:
    """How the domain's training text uses the experts."""
    return made_once("domain-statistics", calibrate, domain=DOMAIN, tokens=COUNTED, seed=seed, gram=False)


def at_random(path: Path, seed: int, out: Path) -> Path:
    """The same numbers, in every layer given to other experts: as many are chosen, whatever they do."""
    generator = torch.Generator().manual_seed(seed)
    found: Statistics = locum.load_statistics(path)
    layers = {}
    for shape in found.shape.layers:
        order_E = torch.randperm(shape.num_experts, generator=generator)
        layers[shape.name] = {name: found.layers[shape.name][name][:, order_E] for name in ("count", "gate_sum")}
    save_statistics(dataclasses.replace(found, layers=layers), out)
    return out


def train(
    arm: str, rate: float, seed: int, steps: int, scratch: Path, validated: int = 65536
) -> tuple[Path, dict[str, Any]]:
    """The fine-tuned model, and what the training says of itself."""
    asked = ARMS[arm] | {"learning_rate": rate, "seed": seed, "steps": steps, "batch_size": BATCH}
    asked |= {"validate_every": 0, "validation_tokens": validated}
    if asked["how"] == "esft":
        chosen_by = by_use(seed)
        if arm.startswith("esft, random"):
            chosen_by = at_random(chosen_by, seed, scratch / "random.safetensors")
        asked |= {"statistics": chosen_by, "adapter_only": True}
    begin = time.process_time()
    made = locum.recover(MODEL, data=sources("target"), out=scratch / "out", **asked)
    return scratch / "out", made | {"processor_seconds": time.process_time() - begin}


def about(arm: str, rate: float, seed: int, steps: int, out: Path, made: dict[str, Any]) -> dict[str, Any]:
    told = {"arm": arm, "domain_learnt": DOMAIN, "learning_rate": rate, "seed": seed, "steps": steps} | place()
    stored = [out / ADAPTER] if (out / ADAPTER).is_file() else shard_files(out)
    told["bytes"] = sum(file.stat().st_size for file in stored)
    chosen = made.get("trained_experts")
    told["trained_experts"] = None if chosen is None else [len(experts) for experts in chosen.values()]
    return told | {
        key: made[key] for key in ("tokens", "processor_seconds", "peak_bytes", "trainable_parameters", "kept_step")
    }


def file_of(phase: str) -> Path:
    return file_named(f"esft_{phase}")


def select(steps: int, shard: tuple[int, int]) -> None:
    """The domain's validation loss after training, by rate, seed 0."""
    file = file_of("selection")
    done = {(row["arm"], row["learning_rate"], row["steps"]) for row in read(file)}
    jobs = [(arm, rate) for arm, rates in RATES.items() for rate in rates]
    for arm, rate in jobs[shard[0] :: shard[1]]:
        if (arm, rate, steps) in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            out, made = train(arm, rate, 0, steps, Path(scratch))
            row = about(arm, rate, 0, steps, out, made)
        row |= {key: made[key] for key in ("validation_loss_before", "validation_loss")}
        write(file, shard, [row])
        print(json.dumps(row), flush=True)


def chosen(steps: int) -> dict[str, float]:
    """The rate with the lowest validation loss of every arm; what is forgotten depends on it, so one arm has that of another."""
    rows = [row for row in read(file_of("selection")) if row["steps"] == steps]
    tried = {arm: {row["learning_rate"]: row["validation_loss"] for row in rows if row["arm"] == arm} for arm in RATES}
    rates = {arm: min(losses, key=losses.__getitem__) for arm, losses in tried.items() if losses}
    return rates | {"esft, random, rate of token": rates["esft, token"]}


def test(steps: int, shard: tuple[int, int]) -> None:
    """Every arm at its rate, three seeds, on the domain and on the others."""
    file, rates = file_of("test"), chosen(steps)
    done = {(row["arm"], row["seed"], row["steps"]) for row in read(file)}
    jobs = [(arm, seed) for seed in SEEDS for arm in rates]
    for arm, seed in jobs[shard[0] :: shard[1]]:
        if (arm, seed, steps) in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            out, made = train(arm, rates[arm], seed, steps, Path(scratch), VALIDATED)
            told, rows = about(arm, rates[arm], seed, steps, out, made), []
            for of, tokens in MEASURED.items():
                asked = {"against": MODEL, "tokens": tokens, "name": arm, "seed": seed}
                measured = map(short, locum.evaluate(out, data=sources(of), **asked))
                rows += [told | {"of": of} | row for row in measured if row["domain"] == "all"]
        write(file, shard, rows)
        print(arm, seed, rates[arm], *(f"{r['of']} {r['value']:+.4f}" for r in rows if is_delta(r)), flush=True)


def is_delta(row: dict[str, Any]) -> bool:
    return row["metric"] == "loss_delta" and row["model"] != "original"


def table(steps: int) -> str:
    """Means over seeds, and the widest of their intervals."""
    rows = [row for row in read(file_of("test")) if row["steps"] == steps]
    lines = [
        "| way | rate | experts of a layer | trained | bytes | loss above the original, the domain | the other domains | seconds of a processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm and is_delta(row)]
        if not mine:
            continue
        told = [arm, f"{mine[0]['learning_rate']:g}", experts_of(mine)]
        told += [f"{mean(mine, key):,.0f}" for key in ("trainable_parameters", "bytes")]
        for of in MEASURED:
            values = [row for row in mine if row["of"] == of]
            low, high = min(row["low"] for row in values), max(row["high"] for row in values)
            told.append(f"{mean(values, 'value'):+.4f} ({low:+.4f} to {high:+.4f})")
        told.append(f"{mean(mine, 'processor_seconds'):.0f}")
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def experts_of(rows: list[dict[str, Any]]) -> str:
    counts = [count for row in rows for count in row["trained_experts"] or ()]
    return f"{min(counts)} to {max(counts)}" if counts else "all"


if __name__ == "__main__":
    command(__doc__, 40, {"select": select, "test": test}, map(file_of, ("selection", "test")), table)
