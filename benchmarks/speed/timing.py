"""What the timed benchmarks share: interleaved rounds, random text and models, and a result that says where it is from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from locum.data.tokens import Tokens

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


def random_olmoe(layers: int, vocabulary: int = 50304) -> transformers.PreTrainedModel:
    """Decoder layers of OLMoE-1B-7B's shape (64 experts of 2048 x 1024, top-8) with random weights, in bfloat16."""
    sizes = {
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }  # the default is 2048 wide
    config = transformers.OlmoeConfig(**sizes, eos_token_id=2)
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """The commit of the sources, with "+" when they were changed since; None outside a repository. COMMIT says it for a copy."""
    if told := os.environ.get("COMMIT"):
        return told
    here = Path(__file__).parents[1]
    try:
        run = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", ".", "../src"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0] + "+" * bool(run[1])


def publish(result: dict[str, Any], threads: int, out: Path | None) -> None:
    """Print a result as one line of JSON with the source and the machine it was measured on, and append it to a file."""
    machine = {
        "threads": threads,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    line = json.dumps(result | machine)
    print(line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
