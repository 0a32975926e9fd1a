"""How long searches take on one layer: MoE-I2's genetic one, beside what trying each candidate naively would, and that of auto.

    python -m benchmarks.speed.search [--threads 2] [--dtype bfloat16] [--out results/search_speed.jsonl]
    python -m benchmarks.speed.search --method auto --threads 1 --experts 8 --top-k 2 --width 576 --expert-width 1536

One decoder layer with random weights and a wide router (64 experts, top-8, width 2,048, expert width 1,024), 2,048 tokens,
a quarter of the experts removed, a population of 100 and 50 generations, which is the paper's search. `seconds_cache` is
the pass that runs every expert once on every token; `seconds_search` is everything after it. Beside the search stands
its floor: the operations of its evaluations over the peak that a large float64 product reaches here, on as many threads.
`seconds_naive` is what the same number of candidates would take one at a time, each with a forward pass of the layer's
router and experts over the same tokens: measured on a few candidates and multiplied.

With `--method auto`, all of its candidates are built for the layer's experts and tried on the tokens, but for the model's losses
(`--price output`), which depend on the other layers. A few experts do: candidates are built expert by expert. PYTHONPATH and COMMIT take another
commit's sources, so that two take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.speed.timing import publish, random_tokens
from locum.budgets.sets import search_sets
from locum.measure.calibration import calibrate
from locum.measure.removals import ModelExplorer
from locum.methods.auto import Auto
from locum.models.families import find_layers
from locum.models.masking import MaskedRouters

WIDE = 0.1  # of the router's weights: its inputs are normed, so logits get a standard deviation of about 4.5


def one_layer(options: argparse.Namespace) -> transformers.PreTrainedModel:
    config = transformers.OlmoeConfig(
        vocab_size=4096,
        hidden_size=options.width,
        intermediate_size=options.expert_width,
        num_hidden_layers=1,
        num_attention_heads=options.width // 64,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    torch.nn.init.normal_(find_layers(model)[0].router.weight, std=WIDE)
    return model


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_flops(repeats: int = 3, size: int = 2048) -> float:
    """Operations per second of the fastest of some large float64 products."""
    one, two = (torch.randn(size, size, dtype=torch.float64) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: one @ two) for _ in range(repeats + 1))


def naive_seconds(explorer: ModelExplorer, name: str, masks_CE: Tensor) -> float:
    """One candidate at a time through the layer's block, router and experts; the median of them."""
    layer, cache = explorer.layers[name], explorer._caches[name]

    def run(removed_E: Tensor) -> None:
        with torch.no_grad(), MaskedRouters([(layer, removed_E)]):
            for call in cache.calls:
                layer.block(*call.args, **call.kwargs)

    return torch.tensor([seconds(lambda m=mask_E: run(m)) for mask_E in masks_CE]).median().item()


def auto_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Wall-clock and processor seconds of the search of auto, after its calibration on twice as many tokens."""
    model, method = one_layer(options), Auto(price="output")
    tokens = random_tokens(4096, max(1, options.tokens // 64), 128)
    needs = [name for name in method.needs() if name not in ("candidate_error", "candidate_loss", "error_price")]
    statistics = calibrate(model, tokens, needs=tuple(needs))
    explorer = ModelExplorer(model, tokens, sample=options.tokens, statistics=statistics)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    (found,) = method.explore(explorer, lambda *_: None).values()
    ends = time.perf_counter(), time.process_time()
    error_EC = found["candidate_error"]
    return {
        "seconds_search": round(ends[0] - begin, 1),
        "processor_seconds_search": round(ends[1] - cpu_begin, 1),
        "candidates": int(error_EC.isfinite().all(0).sum()),
        "error_sum": float(error_EC[error_EC.isfinite()].sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (
        ("--threads", 2),
        ("--experts", 64),
        ("--top-k", 8),
        ("--width", 2048),
        ("--expert-width", 1024),
        ("--tokens", 2048),
        ("--removed", 16),
        ("--population", 100),
        ("--generations", 50),
        ("--naive", 3),
    ):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--method", choices=("moe-i2", "auto"), default="moe-i2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="append the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.method == "auto":
        sizes = {
            name: getattr(options, name) for name in ("experts", "top_k", "width", "expert_width", "tokens", "dtype")
        }
        publish(
            {"benchmark": "search_speed", "method": "auto", **auto_seconds(options), **sizes},
            options.threads,
            options.out,
        )
        return
    model = one_layer(options)
    name = find_layers(model)[0].shape.name
    explorer = ModelExplorer(model, random_tokens(4096, max(1, options.tokens // 128), 128), sample=options.tokens)
    nothing_1E = torch.zeros(1, options.experts, dtype=torch.bool)
    cache_seconds = seconds(lambda: explorer.output_error(name, nothing_1E))
    asked: list[Tensor] = []

    def errors(removed_CE: Tensor) -> Tensor:
        asked.append(removed_CE)
        return explorer.output_error(name, removed_CE)

    sizes = {"population": options.population, "generations": options.generations}
    begin = time.perf_counter()
    best = search_sets(options.experts, options.removed, errors, **sizes)
    search_seconds = time.perf_counter() - begin
    evaluations = sum(len(removed_CE) for removed_CE in asked)
    ahead = options.top_k + options.removed
    operations = evaluations * options.tokens * 2 * (ahead * ahead + ahead)
    naive = naive_seconds(explorer, name, asked[0][: options.naive])
    result = {
        "benchmark": "search_speed",
        "seconds_cache": round(cache_seconds, 2),
        "seconds_search": round(search_seconds, 2),
        "evaluations": evaluations,
        "floor_seconds": round(operations / peak_flops(), 3),
        "seconds_naive": round(naive * evaluations, 1),
        "naive_measured_on": options.naive,
        "rule": explorer._caches[name].rule is not None,
        "best_error": best[0][1],
        **{k: v for k, v in vars(options).items() if k not in ("out", "naive", "threads")},
    }
    publish(result, options.threads, options.out)


if __name__ == "__main__":
    main()
