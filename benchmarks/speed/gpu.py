"""The container on a GPU: whether it is right, how fast it is, what memory it takes, and whether whole models run.

    python -m benchmarks.speed.gpu [--part parity speed memory bits tiles model] [--tokens 1 16 64 512 2048 8192] [--plan NAME ...]
                                   [--way NAME ...] [--rounds 9] [--device cuda] [--out results/gpu.jsonl]

One layer of OLMoE-1B-7B's shape (layer.py), every way through the container and every stock implementation:

    parity   against float64 on the same numbers, |out - exact| / |exact|; `bfloat16` etc. in TOLERANCE are the limits
    speed    medians of interleaved rounds, by the device's own events, its cache overwritten before each; at decoding sizes
             also replayed from a CUDA graph, which cannot be made of anything that waits for the device
    memory   most that a forward pass holds beyond weights and inputs
    bits     gpu_bits.py: containers in few bits, the short of it by
             `--part bits --tokens 1 16 512 --format int4-g32 int8-g32 --rounds 5`
    tiles    gpu_bits.py: other sizes of what a program takes at a time; only where it is asked for
    model    gpu_model.py

`floor` is the bytes of weights that the draws touch over the measured bandwidth, or their operations over the measured
rate, whichever takes longer. Exit code 1 if anything is not within its limit, 2 without the device.

Letters: T tokens, K top-k.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.speed import gpu_bits, gpu_model
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
from benchmarks.speed.gpu_tables import bits_table, layer_table, model_table, tiles_table
from benchmarks.speed.timing import publish
from locum.checkpoints.application import make_container
from locum.containers.container import StandInExperts
from locum.containers.costs import container_work
from locum.containers.layout import Layout
from locum.kernels import choice
from locum.models.families import canonical_activation, read_expert
from locum.plans.plan import LayerPlan

OTHER_FORMATS = "lightmoe 50%, uniform"  # the plan that is tried in every format
PARITY_TOKENS = 2048  # at most
GRAPH_TOKENS = 64  # at most
WAITING = ("eager", choice.LOOP)  # no graph can be made of those
COPIED = 2**31  # bytes of weights that may be gathered for pairs
PARTS = ("parity", "speed", "memory", "bits", "tiles", "model")
WAYS = (choice.LOOP, "grouped", "gathered", "triton")


class Layer(NamedTuple):
    name: str
    plan: LayerPlan
    odds: float
    container: StandInExperts
    ways: list[str]  # those to try


def layer_of(name: str, experts: OlmoeExperts, ways: list[str]) -> Layer:
    """Of a plan by name. Stand-ins have random weights: what an SVD would find takes minutes and the same time to run."""
    plan, mass = layer_speed.plans()[name]
    gate, device = canonical_activation(experts), experts.gate_up_proj.device
    if all(slot.is_kept for slot in plan.slots):
        container = make_container(plan, layer_speed.SHAPE, lambda e: read_expert(experts, e), gate, None, 0)
    else:
        layout = Layout.of(plan, layer_speed.SHAPE)
        container = StandInExperts(layout, gate, torch.bfloat16, "meta").to_empty(device=device)
    torch.manual_seed(1)
    for parameter_name, parameter in container.named_parameters():
        if not parameter_name.startswith("dense") or len(parameter) < layer_speed.E:
            torch.nn.init.normal_(parameter, std=0.02)
    return Layer(name, plan, layer_speed.odds_for(mass), container.requires_grad_(False), ways)


def draws_of(layer: Layer, tokens: int, count: int, device: torch.device) -> tuple[list[Draw], list[Draw]]:
    """Inputs, experts and weights for the original, and the same among the plan's survivors."""
    drawn = [layer_speed.draw(tokens, layer.odds, seed) for seed in range(count)]
    dropped = len(layer.plan.survivors) < layer_speed.E
    own = [(x, layer_speed.renumbered(layer.plan, index) if dropped else index, gate) for x, index, gate in drawn]
    return [tuple(t.to(device) for t in one) for one in drawn], [tuple(t.to(device) for t in one) for one in own]


def ways(layer: Layer, tokens: int, dtype: torch.dtype) -> dict[str, Call]:
    """Those that serve: grouped products want bfloat16, gathered ones copy weights, Triton a GPU."""
    device = next(layer.container.parameters()).device
    serves = {
        choice.LOOP: True,
        "grouped": dtype == torch.bfloat16,
        "gathered": tokens * layer_speed.K * 4 * layer_speed.D * layer_speed.F <= COPIED,
        "triton": device.type == "cuda" and choice.triton_is_there(),
    }
    return {name: way_call(layer.container, name) for name in layer.ways if serves[name]}


def stock(experts: OlmoeExperts, tokens: int) -> dict[str, Call]:
    return {name: layer_speed.stock_call(experts, name) for name in layer_speed.stock_names(tokens)}


def parity(experts: OlmoeExperts, layer: Layer, tokens: int) -> list[dict[str, Any]]:
    """Errors of one plan at one size, by format; the stock implementations are held against the identity plan."""
    device, found = experts.gate_up_proj.device, []
    formats = TOLERANCE if layer.name == OTHER_FORMATS else [torch.bfloat16]
    for dtype in formats:
        one = layer._replace(container=copy.deepcopy(layer.container).to(dtype))
        _, [(x_TD, index_TK, gate_TK)] = draws_of(layer, tokens, 1, device)
        given = x_TD.to(dtype), index_TK, gate_TK.to(dtype)
        exact_TD = exact_of(one.container, given)
        calls = ways(one, tokens, dtype)
        if layer.name == "identity":
            calls |= stock(experts, tokens)
        errors = {name: attempted(call, given, exact_TD) for name, call in calls.items()}
        beyond = [name for name, size in errors.items() if not size < TOLERANCE[dtype]]  # NaN is not smaller either
        named = str(dtype).removeprefix("torch.")
        wrong = [f"{layer.name}, {tokens} tokens, {named}: {name}" for name in beyond]
        about = {"plan": layer.name, "tokens": tokens, "dtype": named, "limit": TOLERANCE[dtype]}
        found.append(about | {"error": errors, "wrong": wrong})
    return found


def speed(
    experts: OlmoeExperts, layer: Layer, tokens: int, rounds: int, clock: Clock, machine: tuple[float, float]
) -> dict[str, Any]:
    """`speedup` is over the fastest stock implementation without a graph; a graph's time is beside it."""
    drawn, own = draws_of(layer, tokens, layer_speed.DRAWS, experts.gate_up_proj.device)
    originals = {name: (call, drawn) for name, call in stock(experts, tokens).items()}
    given = originals | {name: (call, own) for name, call in ways(layer, tokens, torch.bfloat16).items()}
    found = medians({name: layer_speed.runs_of(*one) for name, one in given.items()}, rounds, clock)
    graphs: dict[str, float] = {}
    wrong: list[str] = []
    if clock.cuda and tokens <= GRAPH_TOKENS:
        made = {name: replays(*one) for name, one in given.items() if name not in WAITING}
        graphs = medians({name: one[0] for name, one in made.items() if one is not None}, rounds, clock)
        off = [name for name, one in made.items() if one is not None and not one[1] < TOLERANCE[torch.bfloat16]]
        off += [f"{name} (none can be made)" for name, one in made.items() if one is None and name not in originals]
        wrong = [f"{layer.name}, {tokens} tokens, graph: {name}" for name in off]
    works = [container_work(layer.container, *one) for one in own]
    size, count = (statistics.median(numbers) for numbers in list(zip(*works, strict=True))[:2])
    floor, best = max(2 * size / machine[0], count / machine[1]), min(found[name] for name in originals)
    contenders: dict[str, dict[str, float]] = {}
    for name, seconds in found.items():
        contenders[name] = {"ms": round(seconds * 1e3, 4), "speedup": round(best / seconds, 3)}
        if name in graphs:
            contenders[name]["graph_ms"] = round(graphs[name] * 1e3, 4)
        if name not in originals:  # which have more to read and to do
            least = min(seconds, graphs.get(name, seconds))
            reached = {"gb_s": 2 * size / least / 1e9, "tflop_s": count / least / 1e12, "reached": floor / least}
            contenders[name] |= {key: float(f"{value:.3g}") for key, value in reached.items()}
    measured = {"bandwidth_gb_s": round(machine[0] / 1e9, 1), "rate_tflop_s": round(machine[1] / 1e12, 1)}
    about = {"plan": layer.name, "tokens": tokens, "rounds": rounds, "floor_ms": round(floor * 1e3, 4)}
    return about | {"contenders": contenders, "wrong": wrong} | measured


def memory(experts: OlmoeExperts, layer: Layer, tokens: int) -> dict[str, Any]:
    """Most MiB that a forward pass holds beyond what was there before."""
    device = experts.gate_up_proj.device
    [drawn], [own] = draws_of(layer, tokens, 1, device)
    calls = {name: (call, drawn) for name, call in stock(experts, tokens).items()}
    calls |= {name: (call, own) for name, call in ways(layer, tokens, torch.bfloat16).items()}
    beyond = {}
    for name, (call, given) in calls.items():
        call(*given)  # tables, handles and kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*given)
        beyond[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    weights = {
        name: round(sum(p.nbytes for p in one.parameters()) / 2**20, 1)
        for name, one in {"original": experts, "container": layer.container}.items()
    }
    return {"plan": layer.name, "tokens": tokens, "beyond_mib": beyond, "weights_mib": weights}


def layers(options: argparse.Namespace, part: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """One part's results over plans and sizes."""
    experts, clock = layer_speed.stock_layer(options.device), Clock(device)
    machine = limits(clock, device) if part == "speed" else (0.0, 0.0)
    for name in options.plan:
        layer = layer_of(name, experts, options.way)
        for tokens in options.tokens:
            if part == "parity":
                yield from parity(experts, layer, tokens) if tokens <= PARITY_TOKENS else []
            elif part == "speed":
                yield speed(experts, layer, tokens, options.rounds, clock, machine)
            else:
                yield memory(experts, layer, tokens)


def rows_of(part: str, options: argparse.Namespace, device: torch.device) -> Iterable[dict[str, Any]]:
    if part == "model":
        return gpu_model.measure(device, options.rounds)
    if part == "bits":
        return gpu_bits.measure(device, options.format, options.tokens, options.rounds)
    if part == "tiles":
        return gpu_bits.tiles_of(device, options.format, options.tokens, options.rounds)
    return layers(options, part, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "tiles"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 512, 2048, 8192])
    parser.add_argument("--plan", nargs="+", choices=list(layer_speed.plans()), default=list(layer_speed.plans()))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help="ways through the container")
    parser.add_argument("--format", nargs="+", default=list(gpu_bits.FORMATS), help="number formats of the part bits")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program out")
    parser.add_argument("--out", type=Path, help="append the results to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    device, wrong = torch.device(options.device), []
    name = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    with torch.no_grad():
        for part in options.part:
            if part in ("memory", "tiles") and device.type != "cuda":
                continue
            rows = []
            for row in rows_of(part, options, device):
                rows.append(row)
                publish({"benchmark": f"gpu_{part}", "gpu": name} | row, torch.get_num_threads(), options.out)
                wrong += row.get("wrong", ())
            table = {"model": model_table, "bits": bits_table, "tiles": tiles_table}.get(part, layer_table)(rows)
            print(f"\n## {part}, {name}\n\n{table}\n", flush=True)
    for what in wrong:
        print(f"not within its limit: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
