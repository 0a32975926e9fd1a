"""Peak memory of trainings of a model of SmolMoE's shape, half of whose experts LightMoE has replaced.

    python -m benchmarks.bigger.training WORKDIR --out benchmarks/results/bigger_training.jsonl [--only "annealed"]

The checkpoint has random weights in bfloat16, which take the memory that trained ones take. Calibration and plan are those of
the real one (benchmarks/experiments/smolmoe_recovery.py), but for adapters, which begin at plain SVDs, so that few tokens
will do. Old weights fade out until the last step, so that all there ever is at once is there. Every run is a process of its own with one thread, and its peak is the operating system's, of the whole process tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from benchmarks.speed.timing import publish
from locum.bundled import reference_data
from locum.checkpoints.skeleton import read_shape

from .apply import child
from .checkpoint import random_checkpoint

SIZES = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64}
SIZES |= {"num_key_value_heads": 3, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True}
RUNS = ("annealed", "annealed --checkpointing on", "annealed --precision bf16", "lora")


def compressed(here: Path, layers: int) -> Path:
    """The checkpoint that is trained. What is there already is not made again."""
    original, statistics, plan, small = (here / name for name in ("original", "statistics", "plan.json", "small"))
    text = [word for source in reference_data()[:2] for word in ("--data", source)]
    observed = [*text, "--tokens", "1024", "--length", "256", "--batch-size", "2", "--no-gram", "--stream"]
    how = ["--method", "lightmoe", "--start", "svd", "--rank", "16", "--remove", "0.5"]
    if not original.exists():
        random_checkpoint(original, "mixtral", SIZES | {"num_hidden_layers": layers})
    for out, words in {
        statistics: ["calibrate", original, *observed],
        plan: ["plan", statistics, *how],
        small: ["apply", original, "--plan", plan],
    }.items():
        if not out.exists():
            child(["-m", "locum", *map(str, words), "--out", str(out)])
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2, help="of 512 tokens, where a run does not say otherwise")
    parser.add_argument("--only", help="this run alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bigger_training.jsonl"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    here = options.workdir
    here.mkdir(parents=True, exist_ok=True)
    small, out = compressed(here, options.layers), here / "recovered"
    shape = read_shape(here / "original")
    about = {"layers": options.layers, "checkpoint_bytes": shape.bytes, "parameters": shape.parameters}
    about |= {"steps": options.steps, "tokens": 512}
    data = [word for source in reference_data()[:2] for word in ("--data", source)]
    shared = ["--length", 256, "--batch-size", 2, "--steps", options.steps, "--validation-tokens", 512, "--rank", 16]
    shared += ["--checkpoint-every", 0]  # a state is 4 GB, written as it lies in memory
    for run in RUNS if options.only is None else [options.only]:
        shutil.rmtree(out, ignore_errors=True)
        fading = ["--end-fraction", 1] if run.startswith("annealed") else []
        words = ["recover", small, *data, *shared, "--how", *run.split(), *fading, "--out", out]
        measured = child(["-m", "locum", *map(str, words)])
        publish({"run": f"recover --how {run}", **measured, **about}, 1, options.out)


if __name__ == "__main__":
    main()
