"""How much longer a calibration pass takes than a plain forward pass over the same batches.

    python benchmarks/calibration_cost.py [--model DIR] [--threads 2] [--out results/calibration_cost.jsonl]

Every round runs each contender once, in an order that moves on by one each time, so that other load on the machine hits
all of them alike. `ratio` compares medians over the rounds. On a machine that is busy with other things `ratio_fastest`
(the fastest rounds) and `ratio_cpu` (processor time, best with --threads 1) say more. The plain pass is the model's body without its language-modelling head, which calibration does not need
either, with the faster of transformers' eager and grouped_mm experts; `with_head` is what a user's forward pass costs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from locum.calibrate import calibrate
from locum.data import Tokens
from locum.statistics import STATISTICS, check_needs
from timing import Seconds, measure, publish, random_tokens

REFERENCE = Path(__file__).parents[1] / "src" / "locum" / "reference" / "model"
STOCK = ("eager", "grouped_mm")


def load(path: Path | None) -> tuple[transformers.PreTrainedModel, str]:
    if path is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(path).eval(), path.name
    config = transformers.OlmoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval(), "random OLMoE, 12M parameters"


def contenders(model: transformers.PreTrainedModel, tokens: Tokens, batch_size: int) -> dict[str, Callable[[], object]]:
    def forward(module: torch.nn.Module, implementation: str) -> Callable[[], None]:
        def run() -> None:
            model.set_experts_implementation(implementation)
            with torch.inference_mode():
                for ids_BS in tokens.ids_BS.split(batch_size):
                    module(ids_BS, use_cache=False)

        return run

    routing = tuple(n for n in check_needs(None) if "D" not in STATISTICS[n].axes and "norm" not in n)
    return (
        {f"plain {name}": forward(model.base_model, name) for name in STOCK}
        | {f"with_head {name}": forward(model, name) for name in STOCK}
        | {"calibrate all": lambda: calibrate(model, tokens, batch_size=batch_size)}
        | {"calibrate routing": lambda: calibrate(model, tokens, batch_size=batch_size, needs=routing)}
    )


def ratio(seconds: Seconds, name: str, kind: str, summary: Callable[[list[float]], float]) -> float:
    return round(summary(seconds[name]) / min(summary(seconds[f"{kind} {stock}"]) for stock in STOCK), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE if REFERENCE.exists() else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="append the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, name = load(options.model)
    tokens = random_tokens(model.get_input_embeddings().weight.shape[0], options.blocks, options.length)
    seconds, cpu_seconds = measure(contenders(model, tokens, options.batch_size), options.rounds)
    result = {
        "benchmark": "calibration_cost",
        "ratio": ratio(seconds, "calibrate all", "plain", statistics.median),
        "ratio_fastest": ratio(seconds, "calibrate all", "plain", min),
        "ratio_cpu": ratio(cpu_seconds, "calibrate all", "plain", statistics.median),
        "ratio_routing_only": ratio(seconds, "calibrate routing", "plain", statistics.median),
        "ratio_with_head": ratio(seconds, "calibrate all", "with_head", statistics.median),
        "median_seconds": {key: round(statistics.median(values), 4) for key, values in seconds.items()},
        "fastest_seconds": {key: round(min(values), 4) for key, values in seconds.items()},
        "model": name,
        "blocks": options.blocks,
        "length": options.length,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
    }
    publish(result, options.threads, options.out)


if __name__ == "__main__":
    main()
