"""Latency and active parameters of Compressed Experts beside full and half top-k, in one run.

    python -m benchmarks.speed.active [--model reference|olmoe] [--threads 2] [--out results/active_latency.jsonl]

As in the paper (arXiv 2503.00634): random prompts of 32 tokens, batch 8, here with 16 new tokens each, greedily. Every
round runs each contender once, in an order that moves on by one each time; figures are medians over the rounds, ratios
are against the faster of transformers' own implementations with full top-k. `olmoe` is two decoder layers of
OLMoE-1B-7B's shape (64 experts of 2048 x 1024, top-8) in bfloat16 with random weights; `reference` the bundled model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.speed.timing import measure, publish, random_olmoe
from locum.bundled import MODEL
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.containers.layout import active_parameters
from locum.methods import METHODS
from locum.models.sizes import shape_of
from locum.plans.plan import make_plan

STOCK = ("eager", "grouped_mm")
PROMPT, BATCH, NEW = 32, 8, 16
ARMS = {
    "half k": {"vectors": "none"},
    "half k + Compressed Experts": {"vectors": "projections"},
    "half k + vectors on the hidden state": {"vectors": "hidden"},
}


def load(name: str) -> transformers.PreTrainedModel:
    return load_model(MODEL) if name == "reference" else random_olmoe(2, vocabulary=8192)


def generating(model: transformers.PreTrainedModel, ids_BS: torch.Tensor) -> Callable[[], object]:
    ones_BS = torch.ones_like(ids_BS)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids_BS, attention_mask=ones_BS, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("reference", "olmoe"), default="reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="append the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    full = load(options.model)
    shape = shape_of(full)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(2, full.config.vocab_size, (BATCH, PROMPT), generator=generator)
    runs: dict[str, Callable[[], object]] = {}
    active = {"full k": active_parameters(shape)}
    half = copy.deepcopy(full)
    for module in half.modules():
        if getattr(module, "top_k", None) == shape.layers[0].top_k:
            module.top_k //= 2
    for implementation in STOCK:
        for name, model in (("full k", full), ("half k", half)):
            own = copy.deepcopy(model)
            own.set_experts_implementation(implementation)
            runs[f"{name}, stock {implementation}"] = generating(own, ids_BS)
    for name, given in ARMS.items():
        method = METHODS["compressed-experts"](**given)
        plan = make_plan(shape, method.plan(method.score_experts(None, shape), shape, 1.0))
        active[name] = active_parameters(shape, plan)
        runs[f"{name}, container"] = generating(apply_plan(copy.deepcopy(full), plan), ids_BS)
    wall, cpu = measure(runs, options.rounds)
    base = min(statistics.median(wall[f"full k, stock {name}"]) for name in STOCK)
    result = {
        "benchmark": "active_latency",
        "model": options.model,
        "ratio": {name: round(statistics.median(seconds) / base, 3) for name, seconds in wall.items()},
        "median_seconds": {name: round(statistics.median(seconds), 4) for name, seconds in wall.items()},
        "fastest_seconds": {name: round(min(seconds), 4) for name, seconds in wall.items()},
        "median_cpu_seconds": {name: round(statistics.median(seconds), 4) for name, seconds in cpu.items()},
        "active_parameters": active,
        "batch": BATCH,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rounds": options.rounds,
    }
    publish(result, options.threads, options.out)


if __name__ == "__main__":
    main()
