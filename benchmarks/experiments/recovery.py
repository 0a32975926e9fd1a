"""Recovery compared: LightMoE, Replace, pruning + LoRA and LoRA alone on the reference model, equal trainable parameters.

    python -m benchmarks.experiments.recovery select --shard 0/2  learning rates and end fractions, on validation
    python -m benchmarks.experiments.recovery test --shard 0/2    the chosen ones, three seeds, on the test split
    python -m benchmarks.experiments.recovery table               Markdown from the results

Every job calibrates, trains and measures on the bundled text, which the reference model never saw: statistics and
training on its train split, choices on validation, figures on test. All methods train for the same number of steps on
the same batches and, through the rank of their adapters, (nearly) the same number of parameters; LightMoE sets it.
Methods are as published (`preset="paper"`), but for LightMoE whose adapters start whitened, as Locum's default has it.
"""

from __future__ import annotations

import functools
from typing import Any

import locum
from benchmarks.experiments.experiment import (
    COLUMNS,
    SEEDS,
    Choices,
    Experiment,
    cell,
    main,
    recovery,
    statistics,
    train_and_measure,
    trainable,
)
from locum.plans.plan import Plan
from locum.training.ways.annealed import Annealed

FRACTIONS = (0.3, 0.5)
RATES = (1e-3, 3e-3, 1e-2)
END_FRACTIONS = (0.1, 0.2, 0.4)
RANKS = range(4, 32)  # that the others' adapters are chosen from
LIGHTMOE_RANK = 4  # 4 of 256 is to this model what 16 of 2048 is to OLMoE-1B-7B, twice over
METHODS: dict[str, dict[str, Any]] = {
    "LightMoE": {"method": "lightmoe", "how": "annealed"},
    "Replace (w. shared)": {"method": "replace", "how": "lora", "fits_rank": True},
    "Replace (w/o shared)": {"method": "replace", "how": "lora", "fits_rank": True, "options": {"shared": False}},
    "REAP + LoRA": {"method": "prune", "how": "lora", "options": {"score": "reap"}},
    "frequency + LoRA": {"method": "prune", "how": "lora", "options": {"score": "frequency"}},
    "M-SMoE + LoRA": {"method": "m-smoe", "how": "lora"},
    "HC-SMoE + LoRA": {"method": "hc-smoe", "how": "lora"},
    "LightMoE, whitened": {"method": "lightmoe", "how": "lora", "preset": "best", "options": {"rank": LIGHTMOE_RANK}},
    "LoRA, uncompressed": {"method": None, "how": "lora"},
}


@functools.cache
def plan_for(name: str, fraction: float) -> tuple[Plan | None, int]:
    """The plan of a method at a fraction, and the adapter rank that matches LightMoE's trainable parameters."""
    about = METHODS[name]
    stats = statistics()
    lightmoe = locum.plan([stats], method="lightmoe", preset="paper", remove=fraction, rank=LIGHTMOE_RANK)
    if name == "LightMoE":
        return lightmoe, LIGHTMOE_RANK
    target = trainable(lightmoe, "annealed", LIGHTMOE_RANK)

    def made(rank: int) -> Plan | None:
        if about["method"] is None:
            return None
        given = dict(about.get("options", {}), **({"rank": rank} if about.get("fits_rank") else {}))
        return locum.plan(
            [stats], method=about["method"], preset=about.get("preset", "paper"), remove=fraction, **given
        )

    counts = {rank: trainable(made(rank), "lora", rank) for rank in RANKS}
    rank = min(counts, key=lambda r: abs(counts[r] - target))
    return made(rank), rank


def run(name: str, fraction: float, seed: int, split: str, steps: int, **options: Any) -> list[dict[str, Any]]:
    """Compress, train and measure one model; rows for the results file."""
    decided, rank = plan_for(name, fraction)
    chosen = recovery(METHODS[name]["how"], steps, seed, rank=rank, **options)
    extra = {"fraction": fraction}
    keep = METHODS[name]["method"] is None
    return train_and_measure(name, decided, chosen, split, extra, plan_statistics=statistics(), keep_original=keep)


def jobs_to_select() -> list[dict[str, Any]]:
    """Every method at every learning rate, one seed, half removed; LightMoE also at other end fractions."""
    jobs = [{"name": name, "fraction": 0.5, "seed": 0, "learning_rate": rate} for name in METHODS for rate in RATES]
    others = [end for end in END_FRACTIONS if end != Annealed.end_fraction]
    middle = {"name": "LightMoE", "fraction": 0.5, "seed": 0, "learning_rate": RATES[1]}
    return jobs + [{**middle, "end_fraction": end} for end in others]


def jobs_to_test(options: Choices) -> list[dict[str, Any]]:
    jobs = []
    for seed in SEEDS:
        for name in METHODS:
            for fraction in FRACTIONS if METHODS[name]["method"] else (0.5,):
                jobs.append({"name": name, "fraction": fraction, "seed": seed, **options[name, 0.5]})
    return jobs


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds on the test split, with the range that three seeds and the bootstrap leave."""
    rows = [r for r in rows if r["domain"] == "all"]
    lines = [
        "| removed | method | parameters | trained | bits per byte | KL to the original | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    original = [r for r in rows if r["model"] == "original" and r["metric"] == "bits_per_byte"]
    if original:
        o = original[0]
        lines.append(
            f"| 0 | original | {o['provenance']['parameters']:,} | | {o['value']:.3f} ({o['low']:.3f} to {o['high']:.3f}) "
            f"| 0 | 1 |"
        )
    for fraction in (*FRACTIONS,):
        for name in METHODS:
            mine = [r for r in rows if r["model"] == name and r["provenance"]["fraction"] == fraction]
            if not mine:
                continue
            made = mine[0]["provenance"]
            cells = [cell([r for r in mine if r["metric"] == m]) for m in COLUMNS]
            shown = f"{made['removed']:.0%}" if METHODS[name]["method"] else "0"
            lines.append(
                f"| {shown} | {name} | {made['parameters']:,} | {made['trainable_parameters']:,} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


VARIED = ("learning_rate", "end_fraction")
EXPERIMENT = Experiment("recovery", tuple(METHODS), run, jobs_to_select, jobs_to_test, table, VARIED)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
