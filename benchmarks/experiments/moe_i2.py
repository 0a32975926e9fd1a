"""MoE-I2 compared: its search and its ranks against pruning alone and low-rank decomposition alone, on the reference model.

    python -m benchmarks.experiments.moe_i2 select --shard 0/2      learning rates, on the validation split
    python -m benchmarks.experiments.moe_i2 test --shard 0/2        the chosen ones, three seeds, on the test split
    python -m benchmarks.experiments.moe_i2 table                   Markdown from the results

At 25% MoE-I2 is its search alone; at 50% a quarter of the experts is pruned and the rest decomposed, as in the paper.
Every arm is recovered by LoRA for the same number of steps on the same batches. What is decomposed trains its own
factors; pruned models get adapters of such a rank that they train (nearly) as many parameters, merged at the end.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import locum
from benchmarks.experiments.experiment import (
    CALIBRATED,
    COLUMNS,
    SEEDS,
    Choices,
    Experiment,
    cell,
    made_once,
    main,
    recovery,
    statistics,
    train_and_measure,
    trainable,
)
from locum.plans.plan import Plan
from making.slots import rank_of

FRACTIONS = (0.25, 0.5)
RATES = (3e-4, 1e-3, 3e-3)
ARMS: dict[str, dict[str, Any]] = {
    "MoE-I2": {"method": "moe-i2"},
    "MoE-I2, whitened SVD": {"method": "moe-i2", "start": "whitened"},
    "its search alone": {"method": "moe-i2", "decompose": False},
    "REAP": {"method": "prune", "score": "reap"},
    "SVD alone": {"method": "decompose"},
    "whitened SVD alone": {"method": "decompose", "start": "whitened"},
}
FIRST_STAGE = ("MoE-I2", "MoE-I2, whitened SVD")  # at 25% both are the search alone


@functools.cache
def searched(pruned: float) -> Path:
    """Statistics with what MoE-I2's search would drop, made once."""
    return made_once("moe-i2", locum.search, method="moe-i2", pruned=pruned, tokens=CALIBRATED)


@functools.cache
def plan_for(name: str, fraction: float) -> tuple[Plan, int]:
    """An arm's plan, and the rank of adapters with which it trains as much as SVD alone at this fraction."""
    given = dict(ARMS[name])
    method = given.pop("method")
    if method == "moe-i2":
        alone = not given.get("decompose", True)
        given["pruned"] = fraction if alone else FRACTIONS[0]
        files: list[Any] = [searched(given["pruned"])]
        if fraction == FRACTIONS[0]:
            given["decompose"] = False
    else:
        files = [statistics()]
    decided = locum.plan(files, method=method, preset="paper", remove=fraction, **given)
    if any(rank_of(slot) for layer in decided.layers for slot in layer.slots):
        return decided, 0
    target = trainable(plan_for("SVD alone", fraction)[0], "lora", 0)
    ranks = range(4, 97, 4)
    return decided, min(ranks, key=lambda rank: abs(trainable(decided, "lora", rank) - target))


def run(name: str, fraction: float, seed: int, split: str, steps: int, **options: Any) -> list[dict[str, Any]]:
    """Compress, train and measure one model; rows for the results file."""
    decided, rank = plan_for(name, fraction)
    chosen = recovery("lora", steps, seed, rank=rank, **options)
    extra = {"fraction": fraction}
    return train_and_measure(
        name, decided, chosen, split, extra, plan_statistics=statistics(), keep_original=name == "SVD alone"
    )


def arms_at(fraction: float) -> list[str]:
    """At 25% the arms that decompose after pruning are the search alone."""
    return [name for name in ARMS if fraction > FRACTIONS[0] or name not in FIRST_STAGE]


def jobs_to_select() -> list[dict[str, Any]]:
    """Every arm at every learning rate, one seed, half removed."""
    return [
        {"name": name, "fraction": FRACTIONS[1], "seed": 0, "learning_rate": rate} for rate in RATES for name in ARMS
    ]


def jobs_to_test(options: Choices) -> list[dict[str, Any]]:
    return [
        {"name": name, "fraction": fraction, "seed": seed, **options[name, FRACTIONS[1]]}
        for seed in SEEDS
        for fraction in FRACTIONS
        for name in arms_at(fraction)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds on the test split, with the range that three seeds and the bootstrap leave."""
    rows = [row for row in rows if row["domain"] == "all"]
    lines = [
        "| removed | arm | parameters | trained | bits per byte before training | bits per byte | KL to the original | "
        "top-1 agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in [r for r in rows if r["model"] == "original" and r["metric"] == COLUMNS[0]][:1]:
        lines.append(f"| 0 | original | | | {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | | 0 | 1 |")
    for fraction in FRACTIONS:
        for name in arms_at(fraction):
            here = [r for r in rows if r["provenance"]["fraction"] == fraction]
            mine, before = ([r for r in here if r["model"] == model] for model in (name, f"{name} before"))
            if not mine:
                continue
            made = mine[0]["provenance"]
            cells = [cell([r for r in mine if r["metric"] == metric]) for metric in COLUMNS]
            first = cell([r for r in before if r["metric"] == COLUMNS[0]])
            shown = f"{name} (MoE-I2's first stage)" if fraction == FRACTIONS[0] and "search" in name else name
            lines.append(
                f"| {made['removed']:.1%} | {shown} | {made['parameters']:,} | {made['trainable_parameters']:,} | {first} | "
                f"{' | '.join(cells)} |"
            )
    return "\n".join(lines)


EXPERIMENT = Experiment("moe_i2", tuple(ARMS), run, jobs_to_select, jobs_to_test, table)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
