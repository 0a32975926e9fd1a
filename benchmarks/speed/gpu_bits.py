"""Containers in few bits on a GPU, for gpu.py: right, how fast beside bfloat16 and beside rows made numbers, how large.

A layer of OLMoE's shape (layer.py): whole, half of its experts pruned, LightMoE at 50%. Contenders, in interleaved rounds:

    triton     products straight from packed weights
    loop       cluster by cluster, each row made numbers whenever it is needed: what serves where no product knows a format
    bfloat16   Triton's products of the same plan in bfloat16

The part `tiles` tries other tiles than the usual ones for few tokens.

`error` is against float64 with the numbers that the bytes stand for. `as_fast` is bfloat16's time over triton's, of graphs
where there are any. `floor` is the bytes of weights that the draws touch, scales included, over the measured bandwidth, or
their operations over the measured rate, whichever takes longer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import layer as layer_speed
from benchmarks.speed.gpu_clock import (
    TOLERANCE,
    Call,
    Clock,
    Draw,
    attempted,
    exact_of,
    limits,
    medians,
    replays,
    way_call,
)
from locum.containers.container import StandInExperts
from locum.containers.costs import container_work
from locum.containers.layout import Layout
from locum.formats.rows import is_packed, pack, row_format
from locum.kernels import choice
from locum.models.families import canonical_activation
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Slot

FORMATS = ("int4-g32", "int8-g32", "int4-g128", "fp8-scaled", "nvfp4", "mxfp4", "int3-g32", "int2-g32-z")
THROUGHOUT = ("int4-g32", "int8-g32")  # tried with every plan; the others with the whole layer
GRAPH_TOKENS = 64  # at most
MOST_TOKENS = 2048
# Rows, outputs and inputs of a tile, warps, stages: tried beside the usual ones by the part tiles.
TILES = ((16, 32, 128, 4, 4), (16, 16, 256, 2, 4), (16, 64, 256, 8, 3), (16, 32, 512, 8, 3), (16, 32, 256, 4, 6))
DISTINCT = 4  # rows of a stack that are written; the others are copies, in bytes of their own


class Pair(NamedTuple):
    """One plan in few bits, and the same in bfloat16."""

    name: str
    format: str
    plan: LayerPlan
    packed: StandInExperts
    numbers: StandInExperts


def plans() -> dict[str, LayerPlan]:
    half = layer_speed.E // 2
    pruned = LayerPlan("experts", (KEPT,) * half + (DROPPED,) * half)
    whole, light = (layer_speed.plans()[name][0] for name in ("identity", "lightmoe 50%, uniform"))
    return {"identity": whole, "pruned 50%": pruned, "lightmoe 50%": light}


def in_format(plan: LayerPlan, format: str) -> LayerPlan:
    """The plan with every part that has matrices in a number format."""
    slots = (
        Slot(tuple(replace(part, format=format) if part.stack.has_products else part for part in slot.parts))
        for slot in plan.slots
    )
    return replace(plan, slots=tuple(slots))


def pair_of(name: str, format: str, activate: Call, device: torch.device) -> Pair:
    plan = plans()[name]
    torch.manual_seed(1)
    made = []
    for one in (plan, in_format(plan, format)):
        layout = Layout.of(one, layer_speed.SHAPE)
        container = StandInExperts(layout, activate, torch.bfloat16, "meta").to_empty(device=device)
        made.append(container.requires_grad_(False))
    for parameter in made[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for path, stack in made[1].paths:
        for leaf, size in stack.kind.tensors(stack.variant, made[1].layout).items():
            _fill(getattr(made[1].stack(path), leaf), stack.format, size)
    return Pair(name, format, plan, made[1], made[0])


def _fill(rows: Tensor, format: str, size: Sequence[int]) -> None:
    for row in range(len(rows)):
        if row >= DISTINCT:
            rows[row] = rows[row % DISTINCT]
            continue
        drawn = torch.randn(*size, device=rows.device) * 0.02
        rows[row] = pack(format, row_format(format).write(drawn)) if is_packed(format, (*size,)) else drawn


def calls_of(pair: Pair, device: torch.device) -> dict[str, Call]:
    calls = {"loop": way_call(pair.packed, choice.LOOP)}
    if device.type == "cuda" and choice.triton_is_there():
        calls |= {"triton": way_call(pair.packed, "triton"), "bfloat16": way_call(pair.numbers, "triton")}
    return calls


def draws_of(plan: LayerPlan, tokens: int, device: torch.device) -> list[Draw]:
    drawn = [layer_speed.draw(tokens, 1.0, seed) for seed in range(layer_speed.DRAWS)]
    if len(plan.survivors) < layer_speed.E:
        drawn = [(x, layer_speed.renumbered(plan, index), gate) for x, index, gate in drawn]
    return [tuple(t.to(device) for t in one) for one in drawn]


def floor_of(container: StandInExperts, draws: list[Draw], machine: tuple[float, float]) -> tuple[float, float]:
    """Seconds, and bytes."""
    works = [container_work(container, *one, itemsize=2) for one in draws]
    size, count = (statistics.median(numbers) for numbers in list(zip(*works, strict=True))[:2])
    return max(size / machine[0], count / machine[1]), size


def beyond_mib(call: Call, given: Draw) -> float:
    """Most that a forward pass holds beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*given)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def row_of(pair: Pair, tokens: int, rounds: int, clock: Clock, machine: tuple[float, float]) -> dict[str, Any]:
    device = next(pair.packed.parameters()).device
    draws, calls = draws_of(pair.plan, tokens, device), calls_of(pair, device)
    exact = {"packed": exact_of(pair.packed, draws[0])}
    own = {name: call for name, call in calls.items() if name != "bfloat16"}
    error = {name: attempted(call, draws[0], exact["packed"]) for name, call in own.items()}
    limit = TOLERANCE[torch.bfloat16]
    about = f"{pair.name} in {pair.format}, {tokens} tokens"
    wrong = [f"{about}: {name}" for name, off in error.items() if not off < limit]
    runs = {name: call for name, call in calls.items() if not math.isnan(error.get(name, 0.0))}
    seconds = medians({name: layer_speed.runs_of(call, draws) for name, call in runs.items()}, rounds, clock)
    graphs: dict[str, float] = {}
    if clock.cuda and tokens <= GRAPH_TOKENS:
        made = {name: replays(call, draws) for name, call in runs.items() if name != "loop"}
        graphs = medians({name: one[0] for name, one in made.items() if one is not None}, rounds, clock)
        wrong += [f"{about}, graph: {name}" for name, one in made.items() if one is None or not one[1] < limit]
    floors = {
        name: floor_of(one, draws, machine) for name, one in (("triton", pair.packed), ("bfloat16", pair.numbers))
    }
    contenders = {}
    for name, taken in seconds.items():
        floor, size = floors.get(name, floors["triton"])
        least = min(taken, graphs.get(name, taken))
        contenders[name] = {"ms": round(taken * 1e3, 4), "reached": float(f"{floor / least:.3g}")}
        contenders[name] |= {"gb_s": float(f"{size / least / 1e9:.3g}")}
        if name in graphs:
            contenders[name]["graph_ms"] = round(graphs[name] * 1e3, 4)
    times = graphs if graphs.keys() >= {"triton", "bfloat16"} else seconds
    fast = times["bfloat16"] / times["triton"] if times.keys() >= {"triton", "bfloat16"} else None
    return {
        "plan": pair.name,
        "format": pair.format,
        "tokens": tokens,
        "rounds": rounds,
        "floor_ms": round(floors["triton"][0] * 1e3, 4),
        "as_fast": None if fast is None else round(fast, 3),
        "contenders": contenders,
        "error": error,
        "limit": limit,
        "weights_mib": {
            name: round(sum(p.nbytes for p in one.parameters()) / 2**20, 4)
            for name, one in {"packed": pair.packed, "bfloat16": pair.numbers}.items()
        },
        "beyond_mib": {name: beyond_mib(call, draws[0]) for name, call in runs.items()} if clock.cuda else {},
        "bandwidth_gb_s": round(machine[0] / 1e9, 1),
        "rate_tflop_s": round(machine[1] / 1e12, 1),
        "wrong": wrong,
    }


def tiles_of(
    device: torch.device, formats: Sequence[str], sizes: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """What tiles of a program that decodes cost, the layer being whole: replays of graphs, in milliseconds."""
    from locum.kernels import triton_grouped  # which needs Triton

    clock, usual = Clock(device), triton_grouped.FEW_PACKED
    machine = limits(clock, device)
    activate = canonical_activation(layer_speed.stock_layer("meta"))
    for format in [format for format in formats if format in THROUGHOUT]:
        pair = pair_of("identity", format, activate, device)
        for tokens in [tokens for tokens in sizes if tokens <= GRAPH_TOKENS]:
            draws, call = draws_of(pair.plan, tokens, device), way_call(pair.packed, "triton")
            exact_TD, made, error = exact_of(pair.packed, draws[0]), {}, {}
            for tiles in [usual, *TILES]:
                name = " ".join(map(str, tiles))
                triton_grouped.FEW_PACKED = triton_grouped.Tiles(*tiles)
                error[name] = attempted(call, draws[0], exact_TD)
                if not math.isnan(error[name]) and (graph := replays(call, draws)) is not None:
                    made[name] = graph[0]
            triton_grouped.FEW_PACKED = usual
            yield {
                "plan": "identity",
                "format": format,
                "tokens": tokens,
                "floor_ms": round(floor_of(pair.packed, draws, machine)[0] * 1e3, 4),
                "tiles_ms": {name: round(taken * 1e3, 4) for name, taken in medians(made, rounds, clock).items()},
                "wrong": [f"{format}, tiles {n}" for n, off in error.items() if not off < TOLERANCE[torch.bfloat16]],
            }


def measure(
    device: torch.device, formats: Sequence[str], sizes: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    clock = Clock(device)
    machine = limits(clock, device)
    activate = canonical_activation(layer_speed.stock_layer("meta"))
    for format in formats:
        for name in plans() if format in THROUGHOUT else ["identity"]:
            pair = pair_of(name, format, activate, device)
            for tokens in sizes:
                if tokens <= MOST_TOKENS:
                    yield row_of(pair, tokens, rounds, clock, machine)
