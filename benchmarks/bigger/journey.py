"""The whole job on a checkpoint that is larger than memory, streamed: seconds, peak memory, bytes, and the floor of each stage.

    python -m benchmarks.bigger.journey WORKDIR [--layers 24] [--tokens 8192] --out benchmarks/results/bigger_journey.jsonl

The checkpoint has the config of Qwen1.5-MoE-A2.7B (28.6 GB in bfloat16 with all 24 layers) and random weights. It is inspected,
calibrated, planned and compressed to half by pruning and by LightMoE (adapters from plain SVDs: so few tokens give no whole
Gram), and both are evaluated against it. Every stage is a process of its own, and its peak is the operating system's. The
floor is the bytes that a stage must read and write over the disk's bandwidth, measured by the same loop right before, plus the
operations of the experts and matrices that its tokens pass, and of the products that find adapters, over the rate of a float32
product. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.timing import publish
from locum.bundled import reference_data
from locum.checkpoints.skeleton import active_parameters_in, read_shape
from locum.experts.factors import SPARE, STEPS
from locum.experts.parts.low_rank import LowRank
from locum.plans.plan import Plan
from locum.plans.plan_file import load_plan
from locum.shapes import ModelShape

from .apply import child, disk_seconds
from .checkpoint import random_checkpoint

QWEN = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "vocab_size": 151936,
}
# Routers of random weights leave most experts of some layers alone, so that no threshold on their mass gives half of them.
HOW = {"lightmoe": ["--start", "svd", "--selection", "average"]}


def rate() -> float:
    """Operations per second of a float32 product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(seconds)


def adapter_operations(plan: Plan, shape: ModelShape) -> int:
    """Of the products by which block Krylov iteration finds every adapter of a plan (experts/factors.py)."""
    total = 0
    for layer, planned in zip(shape.layers, plan.layers, strict=True):
        ranks = [part.rank for slot in planned.slots for part in slot.parts if isinstance(part, LowRank)]
        total += sum(2 * layer.parameters() * ((rank + SPARE) * (2 * STEPS + 1) + rank) for rank in ranks)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--measured", type=int, default=2048, help="tokens of evaluation")
    parser.add_argument("--methods", default="prune,lightmoe", help="what it is compressed by")
    parser.add_argument("--precision", default="fp32", help="to compute in")
    parser.add_argument("--out", type=Path, help="append a line for every stage")
    options = parser.parse_args()
    here, original = options.workdir, options.workdir / "original"
    here.mkdir(parents=True, exist_ok=True)
    if not original.exists():
        random_checkpoint(original, "qwen2_moe", QWEN | {"num_hidden_layers": options.layers})
    shape, speed = read_shape(original), rate()
    data = [word for source in reference_data() for word in ("--data", source)]
    run = ["--stream", "--precision", options.precision]
    statistics, small = here / "statistics.safetensors", {name: here / name for name in options.methods.split(",")}

    def stage(
        name: str, *words: Any, read: int = 0, written: int = 0, tokens: int = 0, passes: int = 1, operations: int = 0
    ) -> None:
        floor = disk_seconds(original, written, here / "scratch", limit=read)
        operations += 2 * active_parameters_in(original, shape) * tokens * passes
        measured = child(["-m", "locum", *map(str, words)])
        about = {"stage": name, "layers": options.layers, "checkpoint_bytes": shape.bytes, "tokens": tokens}
        parts = {"disk_seconds": floor, "operations": operations, "operations_per_second": speed}
        sizes = {"bytes_needed": read + written, "floor_seconds": floor + operations / speed, **parts}
        publish(about | measured | sizes, torch.get_num_threads(), options.out)

    stage("inspect", "inspect", original)
    text = [*data, "--tokens", options.tokens, "--length", 512]
    if not statistics.exists():
        made = ["--no-gram", *run, "--out", statistics]
        stage("calibrate", "calibrate", original, *text, *made, read=shape.bytes, tokens=options.tokens)
    for name, out in small.items():
        plan, how = here / f"{name}.json", HOW.get(name, [])
        if not plan.exists():
            stage(f"plan {name}", "plan", statistics, "--method", name, *how, "--remove", 0.5, "--out", plan)
        if not out.exists():
            half = shape.bytes - shape.expert_parameters * shape.expert_itemsize // 2
            sums = adapter_operations(load_plan(plan), shape)
            words = ["apply", original, "--plan", plan, "--out", out]
            stage(f"apply {name}", *words, read=shape.bytes, written=half, operations=sums)
        asked = ["eval", out, *data, "--tokens", options.measured, "--against", original, *run]
        stage(f"eval {name}", *asked, read=shape.bytes + read_shape(out).bytes, tokens=options.measured, passes=2)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
