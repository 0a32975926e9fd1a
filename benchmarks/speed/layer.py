"""One layer of OLMoE-1B-7B's shape: containers of several plans beside every stock implementation of the original.

    python -m benchmarks.speed.layer [--tokens 1 16 64 512 2048] [--plan identity ...] [--threads 2] [--rounds 9]
                                     [--out results/layer_speed.jsonl]

64 experts of 2048 x 1024, top-8, bfloat16, random weights. Rounds are interleaved; every round has a draw of inputs and
routing of its own, the same for all contenders. `speedup` is the median of the fastest stock implementation over the
container's. `floor` is what the machine allows for the container's draws: the bytes of the weights they touch over the
measured bandwidth, or their operations over the measured rate, whichever takes longer; `reached` is floor over median.

batched_mm copies the weights for every pair and is left out where the copies exceed 2 GiB.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.speed.timing import measure, publish
from locum.checkpoints.application import make_container
from locum.containers.container import StandInExperts
from locum.containers.costs import container_work
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.kernels import choice
from locum.models.families import canonical_activation, read_expert
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, stand_in
from locum.shapes import LayerShape

E, K, D, F = 64, 8, 2048, 1024
SHAPE = LayerShape("experts", E, K, D, F, "router", "softmax", False)
STOCK = ("eager", "grouped_mm", "batched_mm")
REPLACED, MASS = 38, 0.27  # LightMoE at 50%: so many of 64 experts, with so much of the gate mass (2603.12645)
RANKS = tuple(range(256, 769, 64))  # mean 512
DRAWS = 8


def plans() -> dict[str, tuple[LayerPlan, float | None]]:
    """A layer's plan by name, and the share of the pairs that go to experts past the first E - REPLACED, if not uniform."""
    kept = E - REPLACED
    light = (KEPT,) * kept + tuple(stand_in(e % 3, 16) for e in range(kept, E))
    bases = tuple(
        Base(tuple(members := range(kept + b, E, 3)), (1 / len(members),) * len(members)) for b in ((1, 2, 0))
    )
    low_rank = tuple(stand_in(None, rank) for rank, _ in zip(itertools.cycle(RANKS), range(E), strict=False))
    pruned = tuple(DROPPED if e % 4 == 3 else low_rank[e] for e in range(E))
    return {
        "identity": (LayerPlan("experts", (KEPT,) * E), None),
        "lightmoe 50%, 27% of the mass": (LayerPlan("experts", light, bases), MASS),
        "lightmoe 50%, uniform": (LayerPlan("experts", light, bases), None),
        "moe-i2 25% pruned, mean rank 512": (LayerPlan("experts", pruned), None),
        "mean rank 512": (LayerPlan("experts", low_rank), None),
        "compressed experts, half k": (LayerPlan("experts", (KEPT,) * E, routing=MainWithVectors(K // 2)), None),
    }


def stock_layer(device: str = "cpu") -> OlmoeExperts:
    config = transformers.OlmoeConfig(num_experts=E, hidden_size=D, intermediate_size=F, num_experts_per_tok=K)
    with torch.device("meta"):
        experts = OlmoeExperts(config).to(torch.bfloat16)
    experts = experts.to_empty(device=device)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return experts


def draw(tokens: int, odds: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, distinct experts and weights; one of the last REPLACED experts is `odds` times as likely as another."""
    generator = torch.Generator().manual_seed(seed)
    weight_E = torch.ones(E)
    weight_E[E - REPLACED :] = odds
    index_TK = torch.multinomial(weight_E.expand(tokens, E), K, generator=generator)
    gate_TK = torch.rand(tokens, K, generator=generator).bfloat16() / K
    return torch.randn(tokens, D, generator=generator).bfloat16(), index_TK, gate_TK


def odds_for(mass: float | None) -> float:
    """The odds that give the last REPLACED experts this share of the pairs, weights being independent of experts."""
    if mass is None:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        odds = (low + high) / 2
        share = float((draw(4096, odds, 0)[1] >= E - REPLACED).float().mean())
        low, high = (odds, high) if share < mass else (low, odds)
    return odds


def renumbered(plan: LayerPlan, index_TK: Tensor) -> Tensor:
    """Routing among the survivors: a pair of a dropped expert goes to the next survivor that the token has not yet."""
    number = {e: i for i, e in enumerate(plan.survivors)}
    rows = []
    for row in index_TK.tolist():
        taken = [number[e] for e in row if e in number]
        free = (i for i in itertools.chain(range(row[0], len(number)), range(len(number))) if i not in taken)
        rows.append([*taken, *itertools.islice(dict.fromkeys(free), K - len(taken))])
    return torch.tensor(rows)


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def machine_limits(experts: OlmoeExperts) -> tuple[float, float]:
    """Bytes per second of reading the layer's weights, operations per second of a large bfloat16 product."""
    whole = experts.gate_up_proj.detach().view(torch.float32)
    square = torch.randn(2048, 2048).bfloat16()
    rate = 2 * 2048**3 / fastest(lambda: square @ square)
    return whole.numel() * 4 / fastest(whole.sum), rate


def runs_of(call: Callable[..., object], draws: list[tuple[Tensor, ...]]) -> Callable[[], object]:
    turn = itertools.cycle(draws)
    return lambda: call(*next(turn))


def stock_names(tokens: int) -> list[str]:
    return [name for name in STOCK if name != "batched_mm" or tokens * K * 3 * D * F * 2 <= 2 * 2**30]


def stock_call(experts: OlmoeExperts, implementation: str) -> Callable[..., object]:
    def call(*given: Tensor) -> object:
        experts.config._experts_implementation = implementation
        return experts(*given)

    return call


def compare(
    experts: OlmoeExperts, container: StandInExperts, plan: LayerPlan, tokens: int, odds: float, rounds: int
) -> dict[str, object]:
    draws = [draw(tokens, odds, seed) for seed in range(DRAWS)]
    dropped = len(plan.survivors) < E
    own = [(x, renumbered(plan, index) if dropped else index, gate) for x, index, gate in draws]
    names = stock_names(tokens)
    runs = {name: runs_of(stock_call(experts, name), draws) for name in names}
    runs["container"] = runs_of(container, own)
    wall, cpu = measure(runs, rounds)
    bandwidth, rate = machine_limits(experts)
    works = [container_work(container, *given) for given in own[: min(rounds, DRAWS)]]
    floor = statistics.median(max(2 * numbers / bandwidth, count / rate) for numbers, count, _ in works)
    median = {name: statistics.median(seconds) for name, seconds in wall.items()}
    median_cpu = {name: statistics.median(seconds) for name, seconds in cpu.items()}
    best = min(names, key=median.__getitem__)
    main = plan.routing.main if plan.routing else K
    with torch.no_grad():
        way = choice.choose(
            torch.device("cpu"), torch.bfloat16, tokens * main, container.num_experts, True, container._low_rank
        )
    return {
        "speedup": round(median[best] / median["container"], 3),
        "speedup_cpu_time": round(min(median_cpu[name] for name in names) / median_cpu["container"], 3),
        "best_stock": best,
        "reached": round(floor / median["container"], 3),
        "floor_ms": round(floor * 1e3, 3),
        "median_ms": {name: round(seconds * 1e3, 3) for name, seconds in median.items()},
        "fastest_ms": {name: round(min(seconds) * 1e3, 3) for name, seconds in wall.items()},
        "way": way,
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "rate_gflop_s": round(rate / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 512, 2048])
    parser.add_argument("--plan", nargs="+", choices=list(plans()), default=list(plans()), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="append the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experts = stock_layer()
    for name in options.plan:
        plan, mass = plans()[name]
        container = make_container(
            plan, SHAPE, lambda e: read_expert(experts, e), canonical_activation(experts), None, 0
        )
        container.requires_grad_(False)
        odds = odds_for(mass)
        for tokens in options.tokens:
            with torch.no_grad():
                result = compare(experts, container, plan, tokens, odds, options.rounds)
            made = {"benchmark": "layer_speed", "plan": name, "tokens": tokens}
            publish(made | result | {"rounds": options.rounds}, options.threads, options.out)
        del container


if __name__ == "__main__":
    main()
