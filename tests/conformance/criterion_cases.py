"""What tests of criteria are made of: one layer with all of its raw numbers, the slow oracles, and cases whose answer is known.

A new criterion needs an oracle here, its formula as a plain loop over raw numbers that shares no code with it, and a planted
case: a layer in which expert 2 is made best and expert 3 worst in the sense of the criterion.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from locum.shapes import LayerShape
from locum.stats.definitions import STATISTICS
from locum.stats.events import RoutedEvent, RouterEvent, Rows, SearchEvent
from locum.stats.sums import LayerStatistics

E, D, F, K, T = 6, 4, 3, 2, 60
NEVER = E - 1
SHAPE = LayerShape("model.layers.0.mlp.experts", E, K, D, F, "model.layers.0.mlp.gate", "softmax", False)


class Layer:
    """Tokens routed among E experts; the last expert is never selected. `scale_E` multiplies outputs."""

    def __init__(self, seed: int = 0, prefer_E: Tensor | None = None, scale_E: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits_TE = torch.randn(T, E, generator=generator) + (0 if prefer_E is None else prefer_E)
        masked_TE = self.logits_TE.clone()
        masked_TE[:, NEVER] = -math.inf
        self.index_TK = masked_TE.topk(K).indices
        self.gate_TK = self.logits_TE.softmax(-1).gather(1, self.index_TK)
        scale_E = torch.ones(E) if scale_E is None else scale_E
        self.out_TKD = torch.randn(T, K, D, generator=generator) * scale_E[self.index_TK][..., None]
        self.in_TD = torch.randn(T, D, generator=generator)
        self.hidden_TKF = torch.randn(T, K, F, generator=generator) * scale_E[self.index_TK][..., None]
        self.found = {name: torch.rand(E, generator=generator) for name, item in STATISTICS.items() if item.searched}

    def statistics(self, order: list[int] | None = None) -> LayerStatistics:
        """Its statistics, with experts relabelled so that new expert i is old expert order[i]."""
        order = order or list(range(E))
        events = {type(event): event for event in self.events(order)}
        return LayerStatistics(SHAPE, {name: whole(d.increment(events[d.event])) for name, d in STATISTICS.items()})

    def events(self, order: list[int]) -> list[object]:
        new_of_old = torch.tensor([order.index(e) for e in range(E)])
        expert_P, pair_P = new_of_old[self.index_TK].flatten().sort(stable=True)
        counts = tuple(torch.bincount(expert_P, minlength=E).tolist())
        routed = RoutedEvent(
            expert_P,
            self.gate_TK.flatten()[pair_P],
            self.out_TKD.flatten(0, 1)[pair_P],
            counts,
            self.in_TD[pair_P // K],
            self.hidden_TKF.flatten(0, 1)[pair_P],
            token_P=pair_P // K,
        )
        router = RouterEvent(self.logits_TE[:, order], (T // 2, T - T // 2))
        return [routed, router, SearchEvent({name: found_E[order].double() for name, found_E in self.found.items()})]

    def outputs(self, expert: int) -> tuple[list[float], list[list[float]]]:
        return [float(self.gate_TK[p]) for p in self.pairs(expert)], [
            self.out_TKD[p].tolist() for p in self.pairs(expert)
        ]

    def pairs(self, expert: int) -> list[tuple[int, int]]:
        return [(t, k) for t in range(T) for k in range(K) if int(self.index_TK[t, k]) == expert]


def whole(increment: Tensor | Rows) -> Tensor:
    return torch.stack([row.double() for row in increment.rows]) if isinstance(increment, Rows) else increment


def norm(vector: list[float]) -> float:
    return math.sqrt(sum(v * v for v in vector))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# --- oracles: the formula of each criterion, one token at a time ---------------------------------------------------

ORACLES: dict[str, Callable[[Layer], list[float]]] = {}


def oracle(function: Callable[[Layer], list[float]]) -> Callable[[Layer], list[float]]:
    ORACLES[function.__name__] = function
    return function


@oracle
def frequency(layer: Layer) -> list[float]:
    return [float(len(layer.pairs(e))) for e in range(E)]


@oracle
def gate(layer: Layer) -> list[float]:
    gates = [layer.outputs(e)[0] for e in range(E)]
    return [sum(g) / sum(map(sum, gates)) for g in gates]


@oracle
def gate_softmax(layer: Layer) -> list[float]:
    return [sum(row[e] for row in layer.logits_TE.double().softmax(-1).tolist()) / T for e in range(E)]


@oracle
def ean(layer: Layer) -> list[float]:
    return [sum(norm(row) for row in layer.outputs(e)[1]) for e in range(E)]


@oracle
def ean_dims(layer: Layer) -> list[float]:
    return [sum(norm([row[d] for row in layer.outputs(e)[1]]) for d in range(D)) for e in range(E)]


@oracle
def man(layer: Layer) -> list[float]:
    return [mean([norm(row) for row in layer.outputs(e)[1]]) for e in range(E)]


@oracle
def msan(layer: Layer) -> list[float]:
    return [mean([sum(v * v for v in row) for row in layer.outputs(e)[1]]) for e in range(E)]


@oracle
def weighted_ean(layer: Layer) -> list[float]:
    return [sum(g * norm(row) for g, row in zip(*layer.outputs(e), strict=True)) for e in range(E)]


@oracle
def reap(layer: Layer) -> list[float]:
    return [mean([g * norm(row) for g, row in zip(*layer.outputs(e), strict=True)]) for e in range(E)]


@oracle
def reap_renormalised(layer: Layer) -> list[float]:
    scores = []
    for e in range(E):
        parts = []
        for t, k in layer.pairs(e):
            parts.append(float(layer.gate_TK[t, k] / sum(layer.gate_TK[t])) * norm(layer.out_TKD[t, k].tolist()))
        scores.append(mean(parts))
    return scores


def order_of_pairs(shared: Callable[[int, int], float], layer: Layer, largest: bool) -> list[float]:
    """MC-Suite's rule for a matrix of pairs: the less used of the first pair goes, and so on; its step for each expert."""
    used = {e: (len(layer.pairs(e)), sum(layer.outputs(e)[0])) for e in range(E)}
    left, steps, step = [e for e in range(E) if used[e][0]], [0.0] * E, 0
    while left:
        step += 1
        sign = 1 if largest else -1
        best = max((sign * shared(p, q) for p in left for q in left if p != q), default=0)
        candidates = []
        for p in left:
            for q in left:
                if p != q and sign * shared(p, q) == best and used[p] < used[q]:
                    candidates.append(p)
        gone = sorted(candidates or left, key=lambda e: used[e])[0]
        steps[gone] = float(step)
        left.remove(gone)
    return steps


def tokens_of_both(layer: Layer) -> Callable[[int, int], float]:
    chosen = [set(row) for row in layer.index_TK.tolist()]
    return lambda p, q: float(sum(p in row and q in row for row in chosen))


@oracle
def ecc_max(layer: Layer) -> list[float]:
    return order_of_pairs(tokens_of_both(layer), layer, largest=True)


@oracle
def ecc_min(layer: Layer) -> list[float]:
    return order_of_pairs(tokens_of_both(layer), layer, largest=False)


@oracle
def mone(layer: Layer) -> list[float]:
    scores = []
    for e in range(E):
        gates, outs = layer.outputs(e)
        means = [mean([row[d] for row in outs]) for d in range(D)]
        spread = [sum((row[d] - means[d]) ** 2 for row in outs) / max(len(outs) - 1, 1) for d in range(D)]
        scores.append(sum(gates) / T * math.sqrt(sum(spread)))
    return scores


@oracle
def random(layer: Layer) -> list[float]:
    gates = [layer.outputs(e)[0] for e in range(E)]
    texts = [f"{SHAPE.name} {len(g)} {sum(g):.6e}" for g in gates]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    return [(int(digest, 16) + 0.5) / 2**64 if g else 0.0 for digest, g in zip(digests, gates, strict=True)]


@oracle
def spread(layer: Layer) -> list[float]:  # of tests/making/foreign
    outs = [layer.outputs(e)[1] for e in range(E)]
    return [max(norm([row[d] for row in out]) for d in range(D)) if out else 0.0 for out in outs]


# --- planted truth -------------------------------------------------------------------------------------------------

LOUD = torch.tensor([1.0, 1.0, 8.0, 0.05, 1.0, 1.0])
POPULAR = torch.tensor([0.0, 0.0, 3.0, -3.0, 0.0, 0.0])
PLANTED: dict[str, Callable[[], Layer]] = {
    **dict.fromkeys(("frequency", "gate", "gate_softmax"), lambda: Layer(3, prefer_E=POPULAR)),
    **dict.fromkeys(
        ("ean", "ean_dims", "man", "msan", "weighted_ean", "reap", "reap_renormalised", "mone", "spread"),
        lambda: Layer(3, scale_E=LOUD),
    ),
}
PLANTED_ELSEWHERE = {
    "random",
    "ecc_max",
    "ecc_min",
}  # what stands for a planted case is a test of its own in test_criteria.py
