"""One layer of OLMoE's shape (layer.py), whole, in bfloat16 and in few bits, on the processor: interleaved rounds.

    python -m benchmarks.speed.cpu_bits [--tokens 1 4 16] [--formats int8-g32 int4-g32] [--threads 1] [--rounds 15]
                                        [--out results/cpu_bits.jsonl]

`as_fast` is the fastest round of bfloat16 over that in few bits, `as_fast_median` the same of medians, `as_fast_cpu` of the process's own
seconds, which is what to look at where other work runs beside. `reached` is what reading the weights that the draws touch would
take, scales included, over the fastest round: `read_mb` over the bandwidth of one loop over the layer's weights, on as many
threads, by the clock and by the process's own seconds. Of many tokens it says little: they compute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.gpu_bits import in_format
from benchmarks.speed.layer import DRAWS, SHAPE, draw, plans, runs_of
from benchmarks.speed.timing import measure, publish
from locum.containers.container import StandInExperts
from locum.containers.costs import container_work
from locum.containers.layout import Layout
from locum.formats.rows import is_packed, pack, row_format

BF16 = "bfloat16"


def swiglu(pre_PG: Tensor) -> Tensor:
    gate_PF, up_PF = pre_PG.chunk(2, dim=-1)
    return functional.silu(gate_PF) * up_PF


def container_of(format: str) -> StandInExperts:
    """The whole layer in a format, or in bfloat16. All rows of a stack have the same numbers, in bytes of their own."""
    plan = plans()["identity"][0]
    layout = Layout.of(plan if format == BF16 else in_format(plan, format), SHAPE)
    container = StandInExperts(layout, swiglu, torch.bfloat16, "cpu").requires_grad_(False)
    for path, stack in container.paths:
        for leaf, size in stack.kind.tensors(stack.variant, layout).items():
            drawn = torch.randn(size[0] // 64, size[1], generator=torch.Generator().manual_seed(0)) * 0.02
            if is_packed(stack.format, size):
                parts = row_format(stack.format).write(drawn)
                drawn = pack(stack.format, {name: part.repeat(64, 1) for name, part in parts.items()})
            else:
                drawn = drawn.repeat(64, 1)
            getattr(container.stack(path), leaf).copy_(drawn)
    return container


def bandwidth_of(container: StandInExperts) -> tuple[float, float]:
    """Bytes per second of one loop over the layer's weights, by the clock and by the process's own seconds."""
    whole = container.stack("dense").gate_up_NGD.view(torch.float32)
    seconds = []
    for _ in range(9):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        whole.sum()
        seconds.append((time.perf_counter() - begin, time.process_time() - cpu_begin))
    wall, cpu = (min(each) for each in zip(*seconds, strict=True))
    return whole.nbytes / wall, whole.nbytes / cpu


@torch.no_grad()
def compare(
    containers: dict[str, StandInExperts], draws: list[tuple[Tensor, ...]], rounds: int, bandwidth: tuple[float, float]
) -> dict[str, object]:
    wall, cpu = measure({name: runs_of(one, draws) for name, one in containers.items()}, rounds)
    found: dict[str, object] = {
        "bandwidth_gb_s": round(bandwidth[0] / 1e9, 2),
        "bandwidth_cpu_gb_s": round(bandwidth[1] / 1e9, 2),
    }
    for name, seconds in wall.items():
        works = [container_work(containers[name], *given, itemsize=2) for given in draws]
        read = statistics.median(read for read, _, _ in works)
        found[name] = {
            "fastest_ms": round(min(seconds) * 1e3, 3),
            "median_ms": round(statistics.median(seconds) * 1e3, 3),
            "as_fast": round(min(wall[BF16]) / min(seconds), 3),
            "as_fast_median": round(statistics.median(wall[BF16]) / statistics.median(seconds), 3),
            "fastest_cpu_ms": round(min(cpu[name]) * 1e3, 3),
            "as_fast_cpu": round(min(cpu[BF16]) / min(cpu[name]), 3),
            "read_mb": round(read / 1e6, 1),
            "reached": round(read / bandwidth[0] / min(seconds), 3),
            "reached_cpu": round(read / bandwidth[1] / min(cpu[name]), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--formats", nargs="+", default=["int8-g32", "int4-g32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    containers = {name: container_of(name) for name in (BF16, *options.formats)}
    bandwidth = bandwidth_of(containers[BF16])
    for tokens in options.tokens:
        draws = [draw(tokens, 1.0, seed) for seed in range(DRAWS)]
        result = compare(containers, draws, options.rounds, bandwidth)
        publish({"benchmark": "cpu_bits", "tokens": tokens} | result, options.threads, options.out)


if __name__ == "__main__":
    main()
