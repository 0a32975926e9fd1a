"""Experts per token against loss: top-k, top-p and skipping on the reference model, nothing trained.

    python -m benchmarks.experiments.fewer_experts select   which share and which weights, on the validation split
    python -m benchmarks.experiments.fewer_experts test     the chosen ones, three seeds, on the test split
    python -m benchmarks.experiments.fewer_experts table

Text is the bundled one, which the reference model never saw in training. p and thresholds are those at which as many experts of a
token of the train split run as are wanted; a seed is that of these tokens. What is left to choose (a share of which weights,
whether weights are scaled to their sum before) is chosen on validation, for every rule and number of experts. The number of experts
that is reported is counted on the tokens that the loss is measured on. A job that is in the results already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch

import locum
from benchmarks.experiments.defaults import is_loss, place, short, write
from benchmarks.experiments.experiment import LENGTH, RESULTS, SEEDS, made_once, read
from locum.bundled import MODEL, reference_data
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.containers.container import StandInExperts
from locum.containers.layout import active_parameters
from locum.data.tokens import Tokens, load_tokens
from locum.measure.loss import evaluate
from locum.models.sizes import shape_of

COUNTED = 16384  # tokens that thresholds are made from
MEASURED = {"validation": 4096, "test": 8192}  # tokens
NEEDED = ("prefix_share", "prefix_gate", "gate_ratio", "gate_share")
EITHER = ("no", "yes")
RULES: dict[str, list[dict[str, Any]]] = {
    "top-k": [{"renormalise": x == "yes", "vectors": "none"} for x in EITHER],
    "top-p": [{"of": of, "renormalise": x} for of in ("selected", "all") for x in EITHER],
    "skipping": [{"beside": beside, "renormalise": x} for beside in ("heaviest", "selected") for x in EITHER],
}
METHODS = {"top-k": "compressed-experts", "top-p": "top-p", "skipping": "skip"}
NUMBERS = {"top-k": (1, 2, 3), "top-p": (1.5, 2, 3), "skipping": (1.5, 2, 3)}


def file_of(split: str) -> Any:
    return RESULTS / f"fewer_experts_{'selection' if split == 'validation' else 'test'}.jsonl"


def plan_of(rule: str, options: dict[str, Any], experts: float, seed: int) -> Any:
    if rule == "top-k":
        return locum.plan(MODEL, method=METHODS[rule], main=int(experts), **options)
    statistics = made_once("statistics", locum.calibrate, tokens=COUNTED, seed=seed, gram=False, also=NEEDED)
    return locum.plan(statistics, method=METHODS[rule], mean_experts=float(experts), **options)


class Counter:
    """How many experts ran, of how many tokens, while a model was measured."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.pairs = self.tokens = 0
        for module in model.modules():
            if isinstance(module, StandInExperts):
                module.register_forward_pre_hook(self._see)

    def _see(self, container: StandInExperts, given: tuple[torch.Tensor, ...]) -> None:
        self.pairs += int((container.routed(*given).index_TM >= 0).sum())
        self.tokens += len(given[0])


def measure(original: Any, tokens: Tokens, split: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one rule with options, at one number of experts and one seed."""
    plan = plan_of(**job)
    model = apply_plan(copy.deepcopy(original), plan)
    counter = Counter(model)
    against = original if split == "test" else None
    rows = evaluate(model, tokens, against=against, seed=job["seed"], model_name=job["rule"], plan=plan.id)
    about = job | {"counted": counter.pairs / counter.tokens, "split": split} | place()
    about["active_parameters"] = active_parameters(shape_of(original), plan)
    kept = [about | short(row) for row in rows if row.domain == "all" and row.metric != "perplexity"]
    return [row for row in kept if row["model"] != "original" or job == first_job(split)]


def jobs_of(split: str) -> Iterator[dict[str, Any]]:
    chosen = best() if split == "test" else {}
    for rule, numbers in NUMBERS.items():
        seeds = SEEDS if split == "test" and rule != "top-k" else SEEDS[:1]  # top-k is counted on nothing
        for experts, seed in itertools.product(numbers, seeds):
            given = [chosen[rule, experts]] if split == "test" else RULES[rule]
            yield from ({"rule": rule, "options": options, "experts": experts, "seed": seed} for options in given)


def first_job(split: str) -> dict[str, Any]:
    return next(jobs_of(split))


def best() -> dict[tuple[str, float], dict[str, Any]]:
    """The options with the lowest loss on validation, by rule and number of experts."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for row in filter(is_loss, read(file_of("validation"))):
        key = (row["rule"], row["experts"])
        if key not in found or row["value"] < found[key]["value"]:
            found[key] = row
    return {key: row["options"] for key, row in found.items()}


def run(split: str) -> None:
    original = load_model(MODEL, dtype=torch.float32)
    data = {"split": split, "length": LENGTH, "tokens": MEASURED[split], "keep_partial": True}
    tokens = load_tokens(reference_data(), load_tokenizer(MODEL), **data)
    file, keys = file_of(split), ("rule", "options", "experts", "seed")
    done = [{key: row[key] for key in keys} for row in read(file)]
    for job in jobs_of(split):
        if job not in done:
            rows = measure(original, tokens, split, job)
            write(file, (0, 1), rows)
            loss = next(filter(is_loss, rows))
            print(*job.values(), f"{loss['counted']:.3f} experts, loss {loss['value']:.4f}", flush=True)


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds of what the loss gains, and the widest interval; in front of it the number of experts."""
    mine = [row for row in rows if row["metric"] == "loss_delta"]
    if not mine:
        return ""
    counted, value = (sum(row[key] for row in mine) / len(mine) for key in ("counted", "value"))
    low, high = min(row["low"] for row in mine), max(row["high"] for row in mine)
    return f"{counted:.2f}: {value:+.4f} ({low:+.4f} to {high:+.4f})"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| experts wanted | {' | '.join(RULES)} |", "|---" * (1 + len(RULES)) + "|"]
    for experts in sorted({x for numbers in NUMBERS.values() for x in numbers}, reverse=True):
        here = [[row for row in rows if (row["rule"], row["experts"]) == (rule, experts)] for rule in RULES]
        lines.append(f"| {experts:g} | {' | '.join(map(cell, here))} |")
    chosen = [f"{rule} at {experts:g}: {options}" for (rule, experts), options in best().items()]
    return "\n".join([*lines, "", *chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("select", "test", "table"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.phase == "table":
        print(table(read(file_of("test"))))
    else:
        run({"select": "validation", "test": "test"}[arguments.phase])


if __name__ == "__main__":
    main()
