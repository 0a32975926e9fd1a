"""How much longer a calibration pass takes than a plain forward pass over the same batches, and than running all experts.

    python -m benchmarks.speed.calibration [--model reference|olmoe|DIR] [--layers 1] [--threads 2]
                                           [--device cpu] [--out results/calibration_cost.jsonl]

Every round runs each contender once, in an order that moves on by one each time, so that other load on the machine hits
all of them alike. `ratio` compares medians over the rounds. On a machine that is busy with other things `ratio_fastest`
(the fastest rounds) and `ratio_cpu` (processor time, best with --threads 1) say more. The plain pass is the model's body
without its language-modelling head, which calibration does not need either, with the faster of transformers' eager and
grouped_mm experts; `with_head` is what a user's forward pass costs. `olmoe` has decoder layers of OLMoE-1B-7B's shape with
random weights in bfloat16.

`all_experts` is what an observer of the kind that REAP's code has costs (arXiv 2510.13999): beside the plain pass, every
expert runs on every token into a buffer of experts x tokens x width, and the norms of the tokens that selected it are
added up, plain and weighted by the router. `times_faster` is its median over calibration's.

Letters: T tokens, K top-k, E experts, D model width.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.timing import Seconds, measure, publish, random_olmoe, random_tokens
from locum.bundled import MODEL
from locum.checkpoints.load import load_model
from locum.data.tokens import Tokens
from locum.measure.calibration import calibrate
from locum.models.families import find_layers
from locum.stats.sums import STATISTICS, check_needs

STOCK = ("eager", "grouped_mm")


def load(name: str, layers: int) -> transformers.PreTrainedModel:
    if name == "olmoe":
        return random_olmoe(layers, vocabulary=8192)
    return load_model(MODEL if name == "reference" else name)


@contextlib.contextmanager
def all_experts_observed(model: transformers.PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """Per layer: number of tokens, sum of output norms, and the same weighted by the router, of each expert."""
    sums: dict[str, list[Tensor]] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x_TD, index_TK, weight_TK = arguments
            out_ETD = x_TD.new_empty(experts.num_experts, *x_TD.shape)
            for e in range(experts.num_experts):
                hidden_TF = experts._apply_gate(functional.linear(x_TD, experts.gate_up_proj[e]))
                out_ETD[e] = functional.linear(hidden_TF, experts.down_proj[e])
            router_TE = weight_TK.new_zeros(len(x_TD), experts.num_experts, dtype=torch.float32).scatter_(
                1, index_TK, weight_TK.float()
            )
            found_E3 = []
            for e in range(experts.num_experts):
                active_N = (index_TK == e).any(dim=1).nonzero().squeeze(1)
                norm_N = torch.linalg.vector_norm(out_ETD[e][active_N].float(), dim=-1)
                weighted = (norm_N * router_TE[active_N, e]).sum()
                found_E3.append(torch.stack([norm_N.new_tensor(len(active_N)), norm_N.sum(), weighted]))
            sums.setdefault(name, []).append(torch.stack(found_E3))

        return hook

    hooks = [x.experts.register_forward_pre_hook(observe(x.shape.name)) for x in find_layers(model)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def contenders(model: transformers.PreTrainedModel, tokens: Tokens, batch_size: int) -> dict[str, Callable[[], object]]:
    def forward(module: torch.nn.Module, implementation: str) -> Callable[[], None]:
        def run() -> None:
            model.set_experts_implementation(implementation)
            with torch.inference_mode():
                for ids_BS in tokens.ids_BS.split(batch_size):
                    module(ids_BS.to(model.device), use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        return run

    def all_experts() -> None:
        with all_experts_observed(model):
            forward(model.base_model, "grouped_mm")()

    routing = tuple(n for n in check_needs(None) if "D" not in STATISTICS[n].axes and "norm" not in n)
    return (
        {f"plain {name}": forward(model.base_model, name) for name in STOCK}
        | {f"with_head {name}": forward(model, name) for name in STOCK}
        | {"calibrate all": lambda: calibrate(model, tokens, batch_size=batch_size)}
        | {"all_experts": all_experts}
        | {"calibrate routing": lambda: calibrate(model, tokens, batch_size=batch_size, needs=routing)}
    )


def ratio(seconds: Seconds, name: str, kind: str, summary: Callable[[list[float]], float]) -> float:
    return round(summary(seconds[name]) / min(summary(seconds[f"{kind} {stock}"]) for stock in STOCK), 3)


def cost(
    model: transformers.PreTrainedModel, tokens: Tokens, batch_size: int, rounds: int
) -> dict[str, float | dict[str, float]]:
    seconds, cpu_seconds = measure(contenders(model, tokens, batch_size), rounds)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "ratio": ratio(seconds, "calibrate all", "plain", statistics.median),
        "ratio_fastest": ratio(seconds, "calibrate all", "plain", min),
        "ratio_cpu": ratio(cpu_seconds, "calibrate all", "plain", statistics.median),
        "ratio_routing_only": ratio(seconds, "calibrate routing", "plain", statistics.median),
        "ratio_with_head": ratio(seconds, "calibrate all", "with_head", statistics.median),
        "times_faster": round(median["all_experts"] / median["calibrate all"], 2),
        "median_seconds": {key: round(value, 4) for key, value in median.items()},
        "fastest_seconds": {key: round(min(values), 4) for key, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference", help="reference, olmoe, or the folder of a checkpoint")
    parser.add_argument("--layers", type=int, default=1, help="decoder layers of olmoe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="append the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model, options.layers).to(options.device)
    tokens = random_tokens(model.get_input_embeddings().weight.shape[0], options.blocks, options.length)
    result = {
        "benchmark": "calibration_cost",
        **cost(model, tokens, options.batch_size, options.rounds),
        "model": options.model,
        "device": options.device,
        "layers": len(find_layers(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "blocks": options.blocks,
        "length": options.length,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
    }
    publish(result, options.threads, options.out)


if __name__ == "__main__":
    main()
