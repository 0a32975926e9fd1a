"""Compressed Experts compared with full and half top-k after the same fine-tuning, on the reference model.

    python -m benchmarks.experiments.compressed_experts select --shard 0/2  learning rates, on the validation split
    python -m benchmarks.experiments.compressed_experts test --shard 0/2    the chosen ones, three seeds, on the test split
    python -m benchmarks.experiments.compressed_experts table               Markdown from the results

As in the paper all parameters are trained, in every arm, for the same steps on the same batches. A setting is the text
that is trained and measured on: all eight domains, or one of them. The gain that a model keeps is how far below the
untrained original (full top-k) its loss is, as a share of how far the model with full top-k gets.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import locum
from benchmarks.experiments.experiment import (
    COLUMNS,
    SEEDS,
    Choices,
    Experiment,
    cell,
    main,
    recovery,
    train_and_measure,
)
from locum.bundled import MODEL, reference_data
from locum.checkpoints.skeleton import read_shape
from locum.containers.layout import active_parameters
from locum.plans.plan import Plan

SETTINGS = ("all", "math")
RATES = (1e-4, 3e-4, 1e-3)
ARMS: dict[str, dict[str, Any] | None] = {
    "full k": None,
    "half k": {"vectors": "none"},
    "half k, renormalised": {"vectors": "none", "renormalise": True},
    "half k + Compressed Experts": {"vectors": "projections"},
    "half k + one static vector a layer": {"vectors": "static"},
}


@functools.cache
def plan_for(name: str) -> Plan | None:
    options = ARMS[name]
    return None if options is None else locum.plan(MODEL, method="compressed-experts", **options)


def run(name: str, setting: str, seed: int, split: str, steps: int, **options: Any) -> list[dict[str, Any]]:
    """Fine-tune and measure one model; rows for the results file."""
    sources = [source for source in reference_data() if setting == "all" or source.startswith(f"{setting}=")]
    chosen = recovery("full", steps, seed, **options)
    extra = {"setting": setting}
    return train_and_measure(name, plan_for(name), chosen, split, extra, sources, keep_original=name == "full k")


def jobs_to_select() -> list[dict[str, Any]]:
    """Every arm at every learning rate on the text of all domains, one seed; what is best there is used everywhere."""
    return [{"name": name, "setting": SETTINGS[0], "seed": 0, "learning_rate": rate} for rate in RATES for name in ARMS]


def jobs_to_test(options: Choices) -> list[dict[str, Any]]:
    return [
        {"name": name, "setting": setting, "seed": seed, **options[name, SETTINGS[0]]}
        for seed in SEEDS
        for setting in SETTINGS
        for name in ARMS
    ]


def kept_gain(mine: list[dict[str, Any]], full: list[dict[str, Any]]) -> str:
    """Mean over seeds of an arm's loss below the original's, as a share of full top-k's; and the seeds' range."""
    by_seed = {row["seed"]: row["value"] for row in full if row["metric"] == "loss_delta"}
    shares = [row["value"] / by_seed[row["seed"]] for row in mine if row["metric"] == "loss_delta"]
    return f"{np.mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds on the test split, with the range that three seeds and the bootstrap leave."""
    rows = [row for row in rows if row["domain"] == "all"]
    shape = read_shape(MODEL)
    lines = [
        "| text | arm | active parameters | trained | bits per byte before training | bits per byte | gain kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        here = [row for row in rows if row["provenance"]["setting"] == setting]
        for row in [r for r in here if r["model"] == "original" and r["metric"] == COLUMNS[0]][:1]:
            shown = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            lines.append(f"| {setting} | original | {active_parameters(shape):,} | | {shown} | | |")
        full = [row for row in here if row["model"] == "full k"]
        for name in ARMS:
            mine, before = ([r for r in here if r["model"] == model] for model in (name, f"{name} before"))
            if not mine:
                continue
            counts = (active_parameters(shape, plan_for(name)), mine[0]["provenance"]["trainable_parameters"])
            cells = [cell([r for r in rows_ if r["metric"] == COLUMNS[0]]) for rows_ in (before, mine)]
            lines.append(
                f"| {setting} | {name} | {counts[0]:,} | {counts[1]:,} | {' | '.join(cells)} | {kept_gain(mine, full)} |"
            )
    return "\n".join(lines)


EXPERIMENT = Experiment("compressed_experts", tuple(ARMS), run, jobs_to_select, jobs_to_test, table, setting="setting")

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
