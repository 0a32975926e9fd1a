"""What tests of criteria are made of: one layer with all of its raw numbers, and the slow oracles.

A new criterion needs an oracle here, its formula as a plain loop over raw numbers that shares no code with it, and a planted
case in criterion_planted.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from locum.shapes import LayerShape
from locum.stats.definitions import STATISTICS
from locum.stats.events import (
    DecoderLayerEvent,
    EveryExpertEvent,
    HiddenGradientEvent,
    RoutedEvent,
    RouterEvent,
    Rows,
    SearchEvent,
    WeightGradientEvent,
    WeightsEvent,
)
from locum.stats.sums import LayerStatistics

E, D, F, K, T, V = 6, 4, 3, 2, 60, 12
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
        self.hidden_back_TKF = torch.randn(T, K, F, generator=generator) * scale_E[self.index_TK][..., None]
        self.id_T = torch.randint(0, V, (T,), generator=generator)
        self.before_TD = torch.randn(T, D, generator=generator)
        self.every_TED = torch.randn(T, E, D, generator=generator).double()
        self.weights, self.weights_back = ([matrices(generator, scale) for scale in scale_E] for _ in range(2))
        self.router_EI = torch.randn(E, D, generator=generator) * scale_E[:, None]
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
            pair_P // K,
            self.id_T[pair_P // K],
            self.turns()[pair_P // K],
            V,
        )
        router = RouterEvent(self.logits_TE[:, order], (T // 2, T - T // 2))
        every_TED = self.every_TED[:, order]
        return [
            routed,
            router,
            WeightsEvent(tuple(self.weights[e] for e in order), self.router_EI[order]),
            EveryExpertEvent(every_TED),
            HiddenGradientEvent(counts, self.hidden_back_TKF.flatten(0, 1)[pair_P]),
            WeightGradientEvent(tuple(self.weights_back[e] for e in order)),
            SearchEvent({name: found_E[order].double() for name, found_E in self.found.items()}),
            DecoderLayerEvent(self.before_TD, self.in_TD),
        ]

    def turns(self) -> Tensor:
        after_TD = self.before_TD + (self.gate_TK[..., None] * self.out_TKD).sum(dim=1)
        return (1 - torch.cosine_similarity(self.before_TD.double(), after_TD.double(), dim=1)).clamp(min=0)

    def turn(self, t: int) -> float:
        """1 - cos(h, h + y) of a token, y what its experts add."""
        before = self.before_TD[t].tolist()
        after = [
            h + sum(float(self.gate_TK[t, k] * self.out_TKD[t, k, d]) for k in range(K)) for d, h in enumerate(before)
        ]
        dot = sum(a * b for a, b in zip(before, after, strict=True))
        return max(0.0, 1 - dot / (norm(before) * norm(after)))

    def outputs(self, expert: int) -> tuple[list[float], list[list[float]]]:
        return [float(self.gate_TK[p]) for p in self.pairs(expert)], [
            self.out_TKD[p].tolist() for p in self.pairs(expert)
        ]

    def pairs(self, expert: int) -> list[tuple[int, int]]:
        return [(t, k) for t in range(T) for k in range(K) if int(self.index_TK[t, k]) == expert]


def matrices(generator: torch.Generator, scale: float) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*side, generator=generator) * scale for side in ((F, D), (F, D), (D, F)))


def numbers(expert: tuple[Tensor, ...]) -> list[float]:
    return [value for matrix in expert for row in matrix.tolist() for value in row]


def cosine(one: list[float], two: list[float]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True)) / (norm(one) * norm(two))


def std(values: list[float]) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def geometric(values: list[float]) -> float:
    return math.exp(mean([math.log(v) for v in values])) if all(values) else 0.0


def turned_round(scores: list[float]) -> list[float]:
    """Highest first: what was highest has what was lowest; 0 stays 0."""
    there = [s for s in scores if s > 0]
    return [min(there) + max(there) - s if s else 0.0 for s in scores]


def whole(increment: Tensor | Rows) -> Tensor:
    return torch.stack([row.double() for row in increment.rows]) if isinstance(increment, Rows) else increment


def norm(vector: list[float]) -> float:
    return math.sqrt(sum(v * v for v in vector))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@functools.cache
def usual(seed: int, order: tuple[int, ...] | None = None) -> LayerStatistics:
    """Statistics of a layer in which nothing is planted, made once."""
    return Layer(seed).statistics(None if order is None else list(order))


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
def proficiency(layer: Layer) -> list[float]:
    gates = [layer.outputs(e)[0] for e in range(E)]
    return [E * sum(g) / sum(map(sum, gates)) for g in gates]


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
def mesa(layer: Layer) -> list[float]:
    rows = layer.logits_TE.double().softmax(-1).tolist()
    entropy = mean([-sum(p * math.log(p) for p in row) for row in rows])
    return man(layer) if entropy > 0.85 * math.log(E) else reap(layer)


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
def easy_ep(layer: Layer) -> list[float]:
    scores = []
    for e in range(E):
        parts = [float(layer.gate_TK[p]) * norm(layer.out_TKD[p].tolist()) * layer.turn(p[0]) for p in layer.pairs(e)]
        scores.append(sum(parts))
    return scores


def vocabularies(layer: Layer) -> list[set[int]]:
    return [{int(layer.id_T[t]) for t, _ in layer.pairs(e)} for e in range(E)]


@oracle
def evtc(layer: Layer) -> list[float]:
    return [len(seen) / V for seen in vocabularies(layer)]


@oracle
def ets_max(layer: Layer) -> list[float]:
    seen = vocabularies(layer)
    return order_of_pairs(lambda p, q: float(len(seen[p] & seen[q])), layer, largest=True)


@oracle
def ets_min(layer: Layer) -> list[float]:
    seen = vocabularies(layer)
    return order_of_pairs(lambda p, q: float(len(seen[p] & seen[q])), layer, largest=False)


@oracle
def eae(layer: Layer) -> list[float]:
    outs = [layer.outputs(e)[1] for e in range(E)]
    return [geometric([std([row[d] for row in out]) for d in range(D)]) if len(out) > 1 else 0.0 for out in outs]


@oracle
def eas(layer: Layer) -> list[float]:
    every = layer.every_TED.tolist()
    return [1 + mean([mean([cosine(row[e], row[i]) for row in every]) for i in range(E) if i != e]) for e in range(E)]


@oracle
def aimer(layer: Layer) -> list[float]:
    found = map(numbers, layer.weights)
    return [math.sqrt(mean([v * v for v in n])) / mean(list(map(abs, n))) for n in found]


@oracle
def ewn(layer: Layer) -> list[float]:
    return [norm(numbers(expert)) for expert in layer.weights]


@oracle
def ews(layer: Layer) -> list[float]:
    flat = list(map(numbers, layer.weights))
    return [1 + mean([cosine(flat[e], flat[i]) for i in range(E) if i != e]) for e in range(E)]


@oracle
def rwn(layer: Layer) -> list[float]:
    return [norm(row) for row in layer.router_EI.tolist()]


@oracle
def wsr(layer: Layer) -> list[float]:
    values = [[torch.linalg.svdvals(m.double()).tolist() for m in expert] for expert in layer.weights]
    return [mean([sum(s * s for s in each) / each[0] ** 2 for each in expert]) for expert in values]


@oracle
def camera(layer: Layer) -> list[float]:
    scores = []
    for e in range(E):
        total = 0.0
        for c in range(F):
            energy = [float(layer.gate_TK[p] * layer.hidden_TKF[p][c]) ** 2 for p in layer.pairs(e)]
            length = sum(float(layer.weights[e][2][d, c]) ** 2 for d in range(D))
            total += length * (0.1 * sum(energy) + 0.9 * max(energy, default=0.0))
        scores.append(total)
    return scores


@oracle
def heapr(layer: Layer) -> list[float]:
    scores = []
    for e in range(E):
        total = 0.0
        for c in range(F):
            squares = mean([float(layer.hidden_TKF[p][c]) ** 2 for p in layer.pairs(e)])
            total += squares * mean([float(layer.hidden_back_TKF[p][c]) ** 2 for p in layer.pairs(e)])
        scores.append(total)
    return scores


@oracle
def egn(layer: Layer) -> list[float]:
    return [norm(numbers(expert)) for expert in layer.weights_back]


@oracle
def egs(layer: Layer) -> list[float]:
    flat = list(map(numbers, layer.weights_back))
    return [1 + mean([cosine(flat[e], flat[i]) for i in range(E) if i != e]) for e in range(E)]


@oracle
def ege(layer: Layer) -> list[float]:
    scores = []
    for gate, up, down in layer.weights_back:
        columns = [[*gate[:, d].tolist(), *up[:, d].tolist(), *down[d].tolist()] for d in range(D)]
        scores.append(geometric([std(column) for column in columns]))
    return scores


@oracle
def ego(layer: Layer) -> list[float]:
    scores = []
    for expert in layer.weights_back:
        flat = numbers(expert)
        scores.append(float(sum(abs(v - mean(flat)) > 3 * std(flat) for v in flat)))
    return scores


@oracle
def eao(layer: Layer) -> list[float]:
    scores = []
    for e in range(E):
        flat = [v for row in layer.outputs(e)[1] for v in row]
        low, high = mean(flat) - 3 * std(flat), mean(flat) + 3 * std(flat)
        far = 0.0
        for begin, end in map(bin_of, flat):
            if not begin <= mean(flat) < end:
                far += min(1.0, (max(0.0, end - high) + max(0.0, low - begin)) / (end - begin))
        scores.append(far)
    return scores


def bin_of(value: float) -> tuple[float, float]:
    """A sixteenth of the octave in which a number lies; of a very small one all that is between it and 0."""
    octave = math.floor(math.log2(abs(value))) if value else -99
    begin = 2.0**octave * (1 + math.floor((abs(value) / 2.0**octave - 1) * 16) / 16)
    begin, end = (begin, begin + 2.0**octave / 16) if octave >= -20 and begin > 2.0**-20 else (0.0, 2.0**-20 * 17 / 16)
    return (begin, end) if value >= 0 else (-end, -begin)


@oracle
def removal_loss(layer: Layer) -> list[float]:
    return layer.found["removal_loss"].tolist()


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


for name, reverse in {
    "frequency": "euf_max",
    "ean_dims": "ean_dims_max",
    "evtc": "evtc_max",
    "eae": "eae_max",
    "eao": "eao_max",
}.items():
    ORACLES[reverse] = lambda layer, name=name: turned_round(ORACLES[name](layer))
for name in ("eas", "ewn", "ews", "rwn", "wsr", "egn", "egs", "ege", "ego"):
    ORACLES[f"{name}_max"] = lambda layer, name=name: turned_round(ORACLES[name](layer))
