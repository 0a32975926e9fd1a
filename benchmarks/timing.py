"""What the timed benchmarks share: interleaved rounds, random tokens, and a result that says where it was measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from locum.data import Tokens

Seconds = dict[str, list[float]]


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> tuple[Seconds, Seconds]:
    """Wall-clock and processor seconds of every run in every round."""
    wall: Seconds = {name: [] for name in runs}
    cpu: Seconds = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            runs[name]()
            if number:  # the first round warms caches and thread pools
                wall[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - cpu_begin)
    return wall, cpu


def random_tokens(vocabulary: int, blocks: int, length: int) -> Tokens:
    """Calibration costs the same for any ids; what they say only moves which experts they reach."""
    ids_BS = torch.randint(2, vocabulary, (blocks, length), generator=torch.Generator().manual_seed(0))
    ones_BS = torch.ones_like(ids_BS)
    return Tokens(
        ids_BS=ids_BS,
        loss_mask_BS=ones_BS.bool(),
        attention_BS=ones_BS,
        bytes_BS=ones_BS,
        domain_B=torch.zeros(blocks, dtype=torch.int64),
        domains=("random",),
        weights=(1.0,),
        fingerprint="random",
        sources=(),
        split="all",
        length=length,
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def publish(result: dict[str, Any], threads: int, out: Path | None) -> None:
    """Print a result as one line of JSON with the machine it was measured on, and append it to a file."""
    machine = {
        "threads": threads,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    line = json.dumps(result | machine)
    print(line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
