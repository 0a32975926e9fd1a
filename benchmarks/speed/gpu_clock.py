"""What the parts of gpu.py measure with: a clock, the machine's limits, graphs, errors.

Letters: T tokens, K top-k.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from locum.containers.container import StandInExperts
from locum.kernels import choice

# Of bfloat16, what four roundings of 2^-8 in a row may err by (tests/containers/test_container.py); of float16 the same
# with 2^-11.
TOLERANCE = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11, torch.float32: 1e-5}
CACHE = 2**28  # bytes, several times the cache of any GPU
Call = Callable[..., Tensor]
Draw = tuple[Tensor, Tensor, Tensor]


class Clock:
    """Seconds that a call keeps the device busy, none of what it reads being in its cache."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.filler = torch.empty(CACHE if self.cuda else 0, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        self.filler.zero_()
        torch.cuda.synchronize()  # so that a call that waits for its launches is seen to
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def way_call(container: StandInExperts, way: str) -> Call:
    def call(*given: Tensor) -> Tensor:
        container.way = way
        return container(*given)

    return call


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def attempted(call: Call, given: Draw, exact_TD: Tensor) -> float:
    """The error, and NaN, with the reason printed, of what does not run at all: the others are still worth knowing."""
    try:
        return error(call(*given), exact_TD)
    except Exception:
        traceback.print_exc()
        return math.nan


def exact_of(container: StandInExperts, given: Draw) -> Tensor:
    """Cluster by cluster in float64, which tests hold against weights written out."""
    wide = copy.deepcopy(container).double()
    x_TD, index_TK, gate_TK = given
    return way_call(wide, choice.LOOP)(x_TD.double(), index_TK, gate_TK.double())


def limits(clock: Clock, device: torch.device) -> tuple[float, float]:
    """Bytes per second, of a copy or of reading, and operations per second of a bfloat16 product of random numbers."""
    size, side = (2**29, 8192) if clock.cuda else (2**22, 512)
    x_N, square = torch.randn(size, device=device), torch.randn(side, side, device=device).bfloat16()
    y_N = torch.empty_like(x_N)
    seconds = [min(clock(run) for _ in range(12)) for run in (lambda: y_N.copy_(x_N), x_N.sum, lambda: square @ square)]
    return max(2 * x_N.nbytes / seconds[0], x_N.nbytes / seconds[1]), 2 * side**3 / seconds[2]


def replays(call: Call, draws: list[Draw]) -> tuple[Callable[[], object], float] | None:
    """CUDA graphs of the draws, replayed in turn, and the first one's error; None where a call waits for the device, as no
    graph can hold that."""
    graphs, off, expected_TD = [], 0.0, call(*draws[0])
    for given in draws:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out_TD = call(*given)
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        graphs.append(graph)
        if len(graphs) == 1:
            out_TD.fill_(float("nan"))
            graph.replay()
            off = error(out_TD, expected_TD.double())
    turn = itertools.cycle(graphs)
    return lambda: next(turn).replay(), off


def medians(runs: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, float]:
    """Of rounds that interleave the runs; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = clock(runs[name])
            if number:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}
