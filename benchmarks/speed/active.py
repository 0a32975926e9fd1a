"""Latency and active parameters of Compressed Experts, top-p and skipping beside full and half top-k, in one run.

    python -m benchmarks.speed.active [--model reference|olmoe] [--threads 2] [--out results/active_latency.jsonl]

As in the paper (arXiv 2503.00634): random prompts of 32 tokens, batch 8, here with 16 new tokens each, greedily. Every
round runs each contender once, in an order that moves on by one each time; figures are medians over the rounds, ratios
are against the faster of transformers' own implementations with full top-k. `olmoe` is two decoder layers of
OLMoE-1B-7B's shape (64 experts of 2048 x 1024, top-8) in bfloat16 with random weights; `reference` the bundled model.

Top-p and skipping are calibrated, on tokens that the model itself writes after such prompts, to half of top-k on average.
`experts_run` is what really ran for a token in the text that each contender wrote, `bookkeeping` the seconds that its policies
take by themselves, at their fastest, at the shapes of one such call: what is between those and half k, at the same number of experts, is the
price of tokens that differ in it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.speed.timing import measure, publish, random_olmoe, random_tokens
from locum.bundled import MODEL
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.containers.container import StandInExperts
from locum.containers.layout import active_parameters
from locum.data.tokens import Tokens
from locum.measure.calibration import calibrate
from locum.methods import METHODS
from locum.models.sizes import shape_of
from locum.plans.plan import make_plan

STOCK = ("eager", "grouped_mm")
PROMPT, BATCH, NEW = 32, 8, 16
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "half k": ("compressed-experts", {"vectors": "none"}),
    "half k + Compressed Experts": ("compressed-experts", {"vectors": "projections"}),
    "half k + vectors on the hidden state": ("compressed-experts", {"vectors": "hidden"}),
    "top-p, half k on average": ("top-p", {}),
    "skipping, half k on average": ("skip", {}),
}


def load(name: str) -> transformers.PreTrainedModel:
    return load_model(MODEL) if name == "reference" else random_olmoe(2, vocabulary=8192)


def generating(model: transformers.PreTrainedModel, ids_BS: torch.Tensor) -> Callable[[], object]:
    ones_BS = torch.ones_like(ids_BS)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids_BS, attention_mask=ones_BS, **options)


def sharing(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy with settings of its own and the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def written(model: transformers.PreTrainedModel, ids_BS: torch.Tensor) -> Tokens:
    """What the model writes after the prompts, prompts included."""
    text = random_tokens(model.config.vocab_size, len(ids_BS), PROMPT + NEW)
    return dataclasses.replace(text, ids_BS=generating(model, ids_BS)())


def experts_run(model: transformers.PreTrainedModel, run: Callable[[], object]) -> float:
    """The mean number of experts of a container that run for a token."""
    pairs = tokens = 0

    def see(container: StandInExperts, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal pairs, tokens
        pairs += int((container.routed(*given).index_TM >= 0).sum())
        tokens += len(given[0])

    hooks = [x.register_forward_pre_hook(see) for x in model.modules() if isinstance(x, StandInExperts)]
    run()
    for hook in hooks:
        hook.remove()
    return pairs / tokens


def bookkeeping(model: transformers.PreTrainedModel, rounds: int = 20) -> float:
    """Seconds of all policies alone in one call of `generate`: over the prompts, then for every new token but one."""
    seconds = 0.0
    for container in (x for x in model.modules() if isinstance(x, StandInExperts)):
        layout, top_k = container.layout, model.config.num_experts_per_tok
        for tokens, calls in ((BATCH * PROMPT, 1), (BATCH, NEW - 1)):
            x_TD = torch.zeros(tokens, layout.hidden_size, dtype=model.dtype)
            weight_TK = torch.rand(tokens, top_k).softmax(dim=1).to(model.dtype)
            index_TK = torch.rand(tokens, layout.num_experts).topk(top_k).indices
            with torch.inference_mode():
                wall, _ = measure({"policy": lambda c=container, a=(x_TD, index_TK, weight_TK): c.routed(*a)}, rounds)
            seconds += calls * min(wall["policy"])
    return seconds


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
    active, ran, alone = {"full k": active_parameters(shape)}, {}, {}
    counted = calibrate(full, written(full, ids_BS), needs=("count", "prefix_share", "gate_ratio"))
    half = sharing(full)
    for module in half.modules():
        if getattr(module, "top_k", None) == shape.layers[0].top_k:
            module.top_k //= 2
    for implementation in STOCK:
        for name, model in (("full k", full), ("half k", half)):
            own = sharing(model)
            own.set_experts_implementation(implementation)
            runs[f"{name}, stock {implementation}"] = generating(own, ids_BS)
    for name, (method, given) in ARMS.items():
        half_k = {} if method == "compressed-experts" else {"mean_experts": shape.layers[0].top_k / 2}
        chosen = METHODS[method](**given, **half_k)
        plan = make_plan(shape, chosen.plan(chosen.score_experts(counted, shape), shape, 1.0))
        active[name] = active_parameters(shape, plan)
        made = apply_plan(copy.deepcopy(full), plan)
        runs[f"{name}, container"] = generating(made, ids_BS)
        ran[name] = round(experts_run(made, runs[f"{name}, container"]), 3)
        alone[name] = round(bookkeeping(made), 5)
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
        "experts_run": ran,
        "bookkeeping": alone,
        "batch": BATCH,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rounds": options.rounds,
    }
    publish(result, options.threads, options.out)


if __name__ == "__main__":
    main()
