"""What `locum apply` needs on a checkpoint of OLMoE-1B-7B's shape: memory, time, bytes, and the disk's own time for those.

    python -m benchmarks.bigger.apply WORKDIR --layers 3 --out benchmarks/results/bigger_apply.jsonl

Plans are made by hand, half of the experts of every layer: pruned; LightMoE as published (four bases, adapters of rank 16 that
start at zero); with --svd the same with adapters from SVDs, which takes minutes a layer. Every run is a process of its own, and its peak is the operating system's.
The floor is the time of reading the original and writing as many bytes as the result has, by the same loop, synced.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.speed.timing import publish
from locum.checkpoints.shard_reader import PIECE
from locum.checkpoints.skeleton import read_shape
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, Plan, make_plan, stand_in
from locum.plans.plan_file import save_plan
from locum.shapes import ModelShape

from .checkpoint import OLMOE, random_checkpoint


def plans(shape: ModelShape) -> dict[str, Plan]:
    def made(layer: Any) -> dict[str, LayerPlan]:
        half, count = layer.num_experts // 2, layer.num_experts
        members = [tuple(range(half + i, count, 4)) for i in range(4)]
        bases = tuple(Base(m, (1 / len(m),) * len(m)) for m in members)
        starts = ("gaussian", "svd")
        light = {
            start: tuple(KEPT if e < half else stand_in((e - half) % 4, 16, start) for e in range(count))
            for start in starts
        }
        return {
            "prune": LayerPlan(layer.name, (KEPT, DROPPED) * half),
            "lightmoe, paper": LayerPlan(layer.name, light["gaussian"], bases),
            "lightmoe, svd": LayerPlan(layer.name, light["svd"], bases),
        }

    by_layer = [made(layer) for layer in shape.layers]
    return {name: make_plan(shape, [each[name] for each in by_layer]) for name in by_layer[0]}


def child(arguments: list[str]) -> dict[str, float]:
    """Seconds, of the clock and of processors, and peak memory of a process and what it starts.

    The peak is VmHWM, by process, asked for ten times a second: what wait4 tells counts the parent's memory too, as it was
    when the process began.
    """
    begin, peaks = time.perf_counter(), {}
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    while True:
        for one in _tree(process.pid):
            peaks[one] = max(peaks.get(one, 0), _high_water(one))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    computed = usage.ru_utime + usage.ru_stime  # what remains where others use the machine too
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "processor_seconds": computed, "peak_bytes": sum(peaks.values())}


def _tree(pid: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, *(one.pid for one in psutil.Process(pid).children(recursive=True))]
    return []


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) * 1024
    return 0


def disk_seconds(original: Path, size: int, scratch: Path, limit: float = math.inf) -> float:
    """Reading the weight files of a folder, or so many bytes of them, and writing so many bytes."""
    buffer, begin = bytearray(PIECE), time.perf_counter()
    for file in original.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while limit > 0 and (count := stream.readinto(buffer)):
                limit -= count
    with scratch.open("wb", buffering=0) as stream:
        while size > 0:
            size -= stream.write(memoryview(buffer)[:size])
        os.fsync(stream.fileno())
    scratch.unlink()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--svd", action="store_true", help="adapters from SVDs too")
    parser.add_argument("--out", type=Path, help="append a line for every run")
    options = parser.parse_args()
    original, small = options.workdir / "original", options.workdir / "small"
    if not original.exists():
        random_checkpoint(original, "olmoe", OLMOE | {"num_hidden_layers": options.layers})
    shape = read_shape(original)
    base = child(["-c", "import locum"])
    publish({"run": "import locum", **base, "layers": options.layers}, torch.get_num_threads(), options.out)
    for name, plan in plans(shape).items():
        if name == "lightmoe, svd" and not options.svd:
            continue
        save_plan(plan, options.workdir / "plan.json")
        shutil.rmtree(small, ignore_errors=True)
        floor = disk_seconds(original, plan.size(shape).bytes, options.workdir / "scratch")
        measured = child(
            ["-m", "locum", "apply", str(original), "--plan", str(options.workdir / "plan.json"), "--out", str(small)]
        )
        sizes = {"bytes_read": shape.bytes, "bytes_written": read_shape(small).bytes, "floor_seconds": floor}
        layer = shape.layers[0]
        sizes["layer_bytes"] = layer.num_experts * layer.parameters() * shape.expert_itemsize
        result = {"run": name, **measured, **sizes, "layers": options.layers}
        publish(result, torch.get_num_threads(), options.out)


if __name__ == "__main__":
    main()
