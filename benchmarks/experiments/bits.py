"""What few bits cost: every expert of the bundled model in 8, 4, 3 and 2 bits, by GPTQ and to the nearest, nothing trained back.

    python -m benchmarks.experiments.bits test    [--tokens 16384]
    python -m benchmarks.experiments.bits table

Text is the bundled one, which the reference model never saw in training: statistics on its train split, figures on its test split.
A seed is that of calibration. Original and compressed models see the same tokens in the same run, so intervals of `loss_delta`
are paired. Nothing is chosen here, so the validation split is not used. A job that is in the results already is not run again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.defaults import is_loss, place, short, write
from benchmarks.experiments.experiment import RESULTS, made_once, read
from locum.bundled import MODEL, reference_data
from locum.checkpoints.skeleton import read_shape

BITS, QUANTISERS = ("8", "4", "3", "2"), ("gptq", "nearest")
MEASURED = 8192  # tokens
FILE = RESULTS / "bits_test.jsonl"


def bits_per_weight(small: Path) -> float:
    """Of the routed experts, scales included."""
    before, after = read_shape(MODEL), read_shape(small)
    return 8 * (after.bytes - before.bytes + before.bytes_of_experts) / before.expert_parameters


def test(tokens: int, seed: int) -> None:
    statistics = made_once("statistics", locum.calibrate, tokens=tokens, seed=seed)
    done = {(row["bits"], row["quantiser"], row["seed"], row["tokens"]) for row in read(FILE)}
    for bits, quantiser in ((b, q) for b in BITS[1:] + BITS[:1] for q in QUANTISERS):
        if (bits, quantiser, seed, tokens) in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            plan, out, started = Path(scratch) / "plan.json", Path(scratch) / "few", time.perf_counter()
            locum.plan([statistics], method="prune", bits=bits, quantiser=quantiser, out=plan)
            locum.apply(MODEL, plan=plan, statistics=statistics, out=out)
            seconds = time.perf_counter() - started
            rows = locum.evaluate(out, data=reference_data(), against=MODEL, tokens=MEASURED, name=bits, seed=seed)
            about = {"bits": bits, "quantiser": quantiser, "seed": seed, "tokens": tokens} | place()
            about |= {"bits_per_weight": round(bits_per_weight(out), 4), "seconds": round(seconds, 1)}
        kept = [about | row for row in map(short, rows) if row["model"] != "original"]
        write(FILE, (0, 1), kept)
        print(bits, quantiser, *(f"{row['value']:.4f}" for row in kept if is_loss(row)), flush=True)


def cell(rows: list[dict[str, Any]], metric: str) -> str:
    mine = [row for row in rows if (row["metric"], row["domain"]) == (metric, "all")]
    low, high = min(row["low"] for row in mine), max(row["high"] for row in mine)
    return f"{sum(row['value'] for row in mine) / len(mine):.4f} ({low:.4f} to {high:.4f})"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| bits | with scales | quantiser | seeds | loss above the original | KL |",
        "|---|---|---|---|---|---|",
    ]
    for bits, quantiser in ((b, q) for b in BITS for q in QUANTISERS):
        mine = [row for row in rows if (row["bits"], row["quantiser"]) == (bits, quantiser)]
        if mine:
            seeds, size = len({row["seed"] for row in mine}), mine[0]["bits_per_weight"]
            cells = " | ".join(cell(mine, metric) for metric in ("loss_delta", "kl"))
            lines.append(f"| {bits} | {size:.2f} | {quantiser} | {seeds} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("test", "table"))
    parser.add_argument("--tokens", type=int, default=16384, help="that calibration observes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.phase == "table":
        print(table(read(FILE)))
    else:
        test(arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()
