"""One budget over all operations against the best single ones: `auto`, at equal bytes, nothing trained back.

    python -m benchmarks.experiments.auto test    [--tokens 16384] [--sample 2048] [--seed 0] [--bits 3.5,2.5,2.0] [--searched FILE]
    python -m benchmarks.experiments.auto table

A size is what all routed experts take together, in bits for each of their weights, scales included. Beside `auto`: the same from costs
of other experts (shuffled) and of chance (random), which say what the choice is worth; from bits alone; every expert in the
bits that this size allows; and single methods on top of 4 bits. Text is the bundled one, which the reference model never saw in
training: the search on its train split, figures on its test split. Nothing is chosen here, so the validation split is not used. All
arms read one statistics file, that of the search; `--searched` names one that is there already. Models are compared with the original on the same
tokens, so intervals of `loss_delta` are paired. A job that is in the results already is not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.bits import cell
from benchmarks.experiments.defaults import is_loss, place, short, write
from benchmarks.experiments.experiment import LENGTH, RESULTS, made_once, read
from locum.bundled import MODEL, reference_data
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.checkpoints.skeleton import read_shape
from locum.data.tokens import load_tokens
from locum.errors import LocumError
from locum.measure.loss import evaluate
from locum.plans.plan import Plan

ARMS: dict[str, dict[str, Any]] = {
    "auto": {"method": "auto"},
    "auto, costs shuffled": {"method": "auto", "costs": "shuffled"},
    "auto, costs random": {"method": "auto", "costs": "random"},
    "auto, bits alone": {"method": "auto", "only": "keep,bits"},
    "all in the same bits": {"method": "prune"},
    "REAP + 4 bits": {"method": "prune", "bits": "4"},
    "decompose + 4 bits": {"method": "decompose", "bits": "4"},
    "lightmoe + 4 bits": {"method": "lightmoe", "bits": "4"},
    "prune at random + 4 bits": {"method": "prune", "score": "random", "bits": "4"},
}
SAME = {4.5: "4", 3.5: "3", 3.0: "2"}  # bits of all experts, by the size that they come to
MEASURED = 8192  # tokens
FILE = RESULTS / "auto_test.jsonl"


def plan_of(arm: str, bits: float, statistics: locum.Statistics) -> Plan:
    """Raises LocumError where an arm cannot have that size."""
    shape = read_shape(MODEL)
    options = dict(ARMS[arm])
    fit = shape.bytes - shape.bytes_of_experts + int(shape.expert_parameters * bits / 8)
    if arm == "all in the same bits":
        if bits not in SAME:
            raise locum.PlanError(f"no bits come to a size of {bits:g}")
        return locum.plan([statistics], bits=SAME[bits], **options)
    return locum.plan([statistics], fit=str(fit), **options)


def test(sizes: list[float], arms: list[str], seed: int, tokens: int, sample: int, searched: Path | None) -> None:
    file = searched or made_once("searched-auto", locum.search, method="auto", tokens=tokens, sample=sample, seed=seed)
    statistics, tokenizer, shape = locum.load_statistics(file), load_tokenizer(MODEL), read_shape(MODEL)
    blocks = load_tokens(
        reference_data(), tokenizer, split="test", length=LENGTH, tokens=MEASURED, keep_partial=True, seed=seed
    )
    original = load_model(MODEL, dtype=torch.float32)
    done = {(row["arm"], row["size"], row["seed"], row["tokens"]) for row in read(FILE)}
    for bits, arm in ((bits, arm) for bits in sizes for arm in arms):
        if (arm, bits, seed, tokens) in done:
            continue
        try:
            started = time.perf_counter()
            plan = plan_of(arm, bits, statistics)
            model = apply_plan(load_model(MODEL, dtype=torch.float32), plan, statistics, seed)
        except LocumError as error:
            print(arm, bits, "refused:", error, flush=True)
            continue
        seconds = time.perf_counter() - started
        rows = evaluate(model, blocks, against=original, seed=seed, model_name=arm, plan=plan.id)
        of_experts = plan.size(shape).bytes - shape.bytes + shape.bytes_of_experts
        about = {"arm": arm, "size": bits, "seed": seed, "tokens": tokens, "sample": sample} | place()
        about |= {"bits_per_weight": round(8 * of_experts / shape.expert_parameters, 4), "seconds": round(seconds, 1)}
        about |= {"predicted_kl": plan.provenance.get("auto", {}).get("predicted_kl")}
        kept = [about | row for row in map(short, rows) if row["model"] != "original"]
        write(FILE, (0, 1), kept)
        print(arm, bits, about["bits_per_weight"], *(f"{r['value']:.4f}" for r in kept if is_loss(r)), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| bits per weight | plan | seeds | loss above the original | KL | predicted KL |",
        "|---|---|---|---|---|---|",
    ]
    for size, arm in ((size, arm) for size in sorted({row["size"] for row in rows}) for arm in ARMS):
        mine = [row for row in rows if (row["arm"], row["size"]) == (arm, size)]
        if mine:
            seeds, told = len({row["seed"] for row in mine}), mine[0]["predicted_kl"]
            predicted = "" if told is None or arm.startswith("auto, costs") else f"{told:.3f}"
            cells = " | ".join(cell(mine, metric) for metric in ("loss_delta", "kl"))
            lines.append(f"| {mine[0]['bits_per_weight']:.2f} | {arm} | {seeds} | {cells} | {predicted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("test", "table"))
    parser.add_argument("--tokens", type=int, default=16384, help="that calibration observes")
    parser.add_argument("--sample", type=int, default=2048, help="tokens that candidates are tried on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", default="4.5,3.5,2.5,2.0", help="sizes, in bits for each weight of the experts")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--searched", type=Path, help="what a search with these options has written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.phase == "table":
        print(table(read(FILE)))
        return
    sizes = [float(word) for word in arguments.bits.split(",")]
    test(sizes, arguments.arms, arguments.seed, arguments.tokens, arguments.sample, arguments.searched)


if __name__ == "__main__":
    main()
