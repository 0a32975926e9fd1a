"""Tokens per second in `generate` after every method, beside the original under transformers' implementations.

    python -m benchmarks.speed.generate [--model reference|olmoe] [--layers 3] [--methods lightmoe ...] [--batch 1 8]
                                        [--prompt 128] [--new 32] [--rounds 5] [--threads 2] [--out FILE]

`olmoe` is a whole model with decoder layers of OLMoE-1B-7B's shape and random weights in bfloat16 (three layers: 1.5
billion parameters). Plans remove half of the experts' parameters; methods that save active parameters do what they do.
Weights do not matter for time, so adapters start from random numbers in place of an SVD, and what MoE-I2's search would
drop is a quarter of the experts of each layer, those with the fewest tokens. Every method is timed beside the original in
rounds that interleave both; figures are medians, `cpu` the same as `generate` in the process's own seconds, for a machine
that is shared; `speedup` is the fastest implementation of the original over the fastest of what the method made. `optimized` is
what `locum.optimize` makes of either.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.speed.timing import publish, random_olmoe, random_tokens
from locum.budgets.target import Target, meet_target
from locum.bundled import MODEL, sample_texts
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.errors import UnsupportedModel
from locum.experts.parts.low_rank import LowRank
from locum.measure.calibration import calibrate
from locum.methods import METHODS
from locum.models.sizes import shape_of
from locum.plans.plan import LayerPlan, Plan, Slot, make_plan
from locum.shapes import ModelShape
from locum.speed.run import Subject
from locum.stats.sums import Statistics

REMOVE, PRUNED = 0.5, 0.25
RANK = {"reference": {"lightmoe": {"rank": 4}, "replace": {"rank": 4}}}  # its experts are too small for the default
CHARACTERS = 10  # of text for a token, on the safe side


def load(name: str, layers: int) -> transformers.PreTrainedModel:
    return load_model(MODEL) if name == "reference" else random_olmoe(layers)


def text(name: str, vocabulary: int, batch: int, length: int) -> torch.Tensor:
    if name != "reference":
        return random_tokens(vocabulary, batch, length).ids_BS
    tokenizer = load_tokenizer(MODEL)
    rows = [
        tokenizer(stretch, add_special_tokens=False)["input_ids"]
        for stretch in sample_texts(batch, CHARACTERS * length)
    ]
    return torch.tensor([row[:length] for row in rows])


def observe(model: transformers.PreTrainedModel) -> Statistics:
    """First-order statistics of random tokens, and what a search would have found."""
    found = calibrate(model, random_tokens(model.config.vocab_size, 4, 256))
    for layer in found.shape.layers:
        count_E = found.layers[layer.name]["count"].sum(dim=0)
        dropped_E = torch.zeros_like(count_E)
        dropped_E[count_E.argsort()[: round(PRUNED * layer.num_experts)]] = 1
        found.layers[layer.name].update(dropped=dropped_E[None], pruned_importance=count_E[None])
    return found


def plan_of(name: str, options: dict[str, Any], observed: Statistics, shape: ModelShape) -> Plan:
    method = METHODS[name](**options)
    scored = method.score_experts(observed, shape)

    def build(amount: float) -> Plan:
        layers = method.plan(scored, shape, amount)
        return make_plan(shape, [_random_starts(layer) for layer in layers], method=name)

    return build(1.0) if method.saves == "active" else meet_target(build, shape, Target(REMOVE))


def _random_starts(layer: LayerPlan) -> LayerPlan:
    def slot_of(slot: Slot) -> Slot:
        parts = (replace(part, start="gaussian") if isinstance(part, LowRank) else part for part in slot.parts)
        return replace(slot, parts=tuple(parts))

    return replace(layer, slots=tuple(map(slot_of, layer.slots)))


def compare(subjects: dict[str, Subject], batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every contender in every round, by phase and for all; rounds interleave the contenders."""
    runs = [(name, which) for name, one in subjects.items() for which in one.implementations]
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        first = number % len(runs)
        for name, which in runs[first:] + runs[:first]:
            try:
                subjects[name].choose(which, batch)
            except UnsupportedModel:  # batched_mm where it would copy gigabytes
                continue
            begin = time.process_time()
            prefill, decode = subjects[name].generate(batch)
            cpu = time.process_time() - begin
            if number:  # the first round warms caches and thread pools
                phases = {"prefill": prefill, "decode": decode, "generate": prefill + decode, "cpu": cpu}
                found = seconds.setdefault(f"{name} {which}", {phase: [] for phase in phases})
                for phase, value in phases.items():
                    found[phase].append(value)
    return seconds


def result_of(
    name: str, batch: int, seconds: dict[str, dict[str, list[float]]], tokens: dict[str, int]
) -> dict[str, Any]:
    medians = {who: {phase: statistics.median(v) for phase, v in by.items()} for who, by in seconds.items()}

    def best(whose: str, phase: str) -> float:
        return min(by[phase] for who, by in medians.items() if who.startswith(whose))

    return {
        "benchmark": "generate_speed",
        "method": name,
        "batch": batch,
        "speedup": {phase: round(best("original", phase) / best("compressed", phase), 3) for phase in tokens},
        "tokens_per_second": {
            who: {phase: round(tokens[phase] / value, 1) for phase, value in by.items()} for who, by in medians.items()
        },
        "median_seconds": {who: {phase: round(v, 4) for phase, v in by.items()} for who, by in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("reference", "olmoe"), default="reference")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers of olmoe")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model, options.layers)
    shape = shape_of(model)
    ids_BS = text(options.model, model.config.vocab_size, max(options.batch), options.prompt + options.new)
    observed = observe(model)
    original = Subject(model, ids_BS, options.prompt)
    for name in options.methods:
        plan = plan_of(name, RANK.get(options.model, {}).get(name, {}), observed, shape)
        compressed = Subject(apply_plan(copy.deepcopy(model), plan, observed), ids_BS, options.prompt)
        for batch in options.batch:
            tokens = {
                "prefill": batch * options.prompt,
                "decode": batch * (options.new - 1),
                "generate": batch * options.new,
                "cpu": batch * options.new,
            }
            seconds = compare({"original": original, "compressed": compressed}, batch, options.rounds)
            about = {"model": options.model, "layers": len(shape.layers), "parameters": shape.parameters}
            about |= {"removed": round(plan.removed(shape), 4), "prompt": options.prompt, "new_tokens": options.new}
            publish(
                result_of(name, batch, seconds, tokens) | about | {"rounds": options.rounds},
                options.threads,
                options.out,
            )
        del compressed


if __name__ == "__main__":
    main()
