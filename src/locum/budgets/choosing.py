"""One candidate for every expert, so that costs are least within a budget of bytes: a knapsack with a choice in each place.

A price for a byte makes experts independent: each takes the candidate with the least cost + price * bytes. The price is searched
for which the whole fits (Lagrange), then what room is left is filled by what gains most for a byte. The sum for a price, less the
price of the budget, is never above the best cost that there is: so it is known how far the choice may be from that (`bound`).

Some candidates share something, a base, that is paid once a layer by all that use it. A layer's bases come in sets, one for each way to
group its experts; a layer uses bases of one set, those that pay. And only so many experts of a layer may go. For a price, the best choice
of a layer under these rules is exact too, but where a set has several bases and more experts would go than may: there the bound still
holds.

Letters: L layers, E experts, C candidates, H shared things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 1e-9  # how near to one another two prices are that are taken for one
STEEPEST = 1e9  # price of all bytes, in units of all costs: fewest bytes, whatever it costs
SURE = 1e5  # up to which costs are not lost in rounding beside prices


@dataclass(frozen=True, eq=False)
class Choices:
    """What the experts of a layer can become."""

    cost_EC: np.ndarray  # infinite where a candidate is not allowed
    bytes_C: np.ndarray  # of one expert, without what it shares; may be below 0
    shared_EC: np.ndarray  # which shared thing the expert then needs, -1 for none; of a set, an expert can use one
    bytes_H: np.ndarray  # of the shared things
    set_H: np.ndarray  # the set that they are of
    gone_C: np.ndarray  # whether the expert leaves the layer
    most_gone: int  # how many may


@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate for every expert of a layer."""

    candidate_E: np.ndarray
    shared: tuple[int, ...]  # the shared things that are used
    cost: float
    bytes: float


@dataclass(frozen=True, eq=False)
class Chosen:
    """A choice for every layer. No choice within the budget costs less than `bound`."""

    layers: list[Choice]
    bound: float

    @property
    def cost(self) -> float:
        return sum(choice.cost for choice in self.layers)

    @property
    def bytes(self) -> float:
        return sum(choice.bytes for choice in self.layers)


def choose(layers: Sequence[Choices], budget: float) -> Chosen:
    """The choice for a budget of bytes. Where nothing fits, the one with the fewest bytes."""
    of_cost = sum(np.where(np.isfinite(x.cost_EC), x.cost_EC, 0).max(1).sum() for x in layers) or 1.0
    of_bytes = sum(np.abs(x.bytes_C).max() * len(x.cost_EC) for x in layers) or 1.0
    unit = of_cost / of_bytes

    def priced(price: float) -> tuple[list[Choice], float]:
        """The best choices for a price, and what the sum of cost and price is at least."""
        found = [best_for(x, price * unit) for x in layers]
        return [choice for choice, _ in found], sum(least for _, least in found)

    def fits(choices: list[Choice]) -> bool:
        return sum(c.bytes for c in choices) <= budget

    (free, bound), (smallest, _) = priced(0.0), priced(STEEPEST)
    if fits(free):
        return Chosen(free, sum(c.cost for c in free))
    if not fits(smallest):
        return Chosen(smallest, float("inf"))
    low, high, over, under = 0.0, STEEPEST, free, smallest
    while high > (low or high / 2) * (1 + NEAR) and high > 1e-30:
        price = (low * high) ** 0.5 if low else high / 1e3
        choices, below = priced(price)
        if price < SURE:
            bound = max(bound, below - price * unit * budget)
        if fits(choices):
            high, under = price, choices
        else:
            low, over = price, choices
    return Chosen(_filled(layers, under, over, budget), bound)


def choose_alike(
    layers: Sequence[Choices], budget: float, most: int, beside: tuple[float, float] = (0.0, 0.0)
) -> Chosen:
    """The choice for a budget of bytes where all experts that stay become one candidate, and equally many leave every layer, at most
    `most`. Where nothing fits, the one with the fewest bytes.

    `beside` are bytes that go besides: where any expert leaves, and for each that leaves every layer. All pairs of a candidate and
    a number are tried, so the choice is the best that there is.
    """
    found: list[tuple[float, float, list[Choice]]] = []
    for stay in np.flatnonzero(~layers[0].gone_C & (layers[0].shared_EC == -1).all(0)):
        for count in range(most + 1):
            made = [_with_so_many_gone(layer, int(stay), count) for layer in layers]
            besides = beside[0] + count * beside[1] if count else 0.0
            cost, size = sum(choice.cost for choice in made), sum(choice.bytes for choice in made)
            if np.isfinite(cost):
                found.append((cost, size - besides, made))
    fitting = [one for one in found if one[1] <= budget]
    if not fitting:
        return Chosen(min(found, key=lambda one: one[1])[2], float("inf"))
    cost, _, made = min(fitting, key=lambda one: one[:2])
    return Chosen(made, cost)


def _with_so_many_gone(layer: Choices, stay: int, count: int) -> Choice:
    """All experts become one candidate, but for those that cost least when they go."""
    candidate_E = np.full(len(layer.cost_EC), stay)
    if count:
        gone = int(layer.gone_C.argmax())
        of_gone_E, of_stay_E = layer.cost_EC[:, gone], layer.cost_EC[:, stay]
        stays_E = np.isfinite(of_stay_E)  # one that cannot has to go
        less_E = np.where(stays_E, of_gone_E - np.where(stays_E, of_stay_E, 0), -np.inf)
        candidate_E[np.argsort(less_E, kind="stable")[:count]] = gone
    return _choice(layer, candidate_E)


def best_for(layer: Choices, price: float) -> tuple[Choice, float]:
    """The choice of one layer with the least cost + price * bytes, and what no choice is below. Of equals the first set, and the first
    candidate."""
    value_EC = layer.cost_EC + price * layer.bytes_C
    best, value, bound = None, np.inf, np.inf
    for of_set in (None, *dict.fromkeys(layer.set_H.tolist())):
        things = [] if of_set is None else np.flatnonzero(layer.set_H == of_set).tolist()
        free, least = _paying(layer, value_EC, price, things, layer.gone_C)
        held, _ = _paying(layer, value_EC, price, things, np.zeros_like(layer.gone_C))
        tried = [[], things] if len(things) == 1 else [free] if free == held else [free, held]
        values = []
        for opened in tried:
            allowed_EC = (layer.shared_EC == -1) | np.isin(layer.shared_EC, opened)
            choice = _choice(layer, _with_few_gone(layer, np.where(allowed_EC, value_EC, np.inf)))
            values.append(choice.cost + price * choice.bytes)
            if values[-1] < value:
                best, value = choice, values[-1]
        bound = min(bound, min(values) if len(things) <= 1 else least)
    if best is None:
        raise ValueError("an expert has no candidate that is allowed")
    return best, bound


def _paying(
    layer: Choices, value_EC: np.ndarray, price: float, things: list[int], may_go_C: np.ndarray
) -> tuple[list[int], float]:
    """The things that gain more than they cost, and the value that they make, where any number of experts may go, or none."""
    open_EC = np.where(~layer.gone_C | may_go_C, value_EC, np.inf)
    alone_E, paying = np.where(layer.shared_EC == -1, open_EC, np.inf).min(1), []
    least_E, spent = alone_E.copy(), 0.0
    for h in things:
        with_E = np.minimum(alone_E, np.where(layer.shared_EC == h, open_EC, np.inf).min(1))
        is_less_E = with_E < alone_E
        less = (alone_E[is_less_E] - with_E[is_less_E]).sum()
        if less > price * layer.bytes_H[h]:
            paying.append(h)
            least_E, spent = np.minimum(least_E, with_E), spent + price * layer.bytes_H[h]
    return paying, least_E.sum() + spent


def _with_few_gone(layer: Choices, value_EC: np.ndarray) -> np.ndarray:
    """[E] the best candidate of every expert, where no more than `most_gone` go: those that gain most by it."""
    stay_EC, gone_EC = (np.where(mask_C, value_EC, np.inf) for mask_C in (~layer.gone_C, layer.gone_C))
    candidate_E, value_E = stay_EC.argmin(1), stay_EC.min(1)
    if layer.gone_C.any() and layer.most_gone:
        less_E = gone_EC.min(1) - value_E
        first_E = np.argsort(less_E, kind="stable")[: layer.most_gone]
        first_E = first_E[less_E[first_E] < 0]
        candidate_E[first_E] = gone_EC[first_E].argmin(1)
    return candidate_E


def _choice(layer: Choices, candidate_E: np.ndarray) -> Choice:
    here = np.arange(len(candidate_E)), candidate_E
    shared = sorted({*layer.shared_EC[here].tolist()} - {-1})
    size = float(layer.bytes_C[candidate_E].sum()) + float(layer.bytes_H[shared].sum())
    return Choice(candidate_E, tuple(shared), float(layer.cost_EC[here].sum()), size)


def _filled(layers: Sequence[Choices], under: list[Choice], over: list[Choice], budget: float) -> list[Choice]:
    """What fits, with whole layers of what does not and then single experts put in, as far as there is room: what gains most for a
    byte goes first."""
    made, room = list(under), budget - sum(c.bytes for c in under)
    gains = [
        (_rate(new.cost - old.cost, new.bytes - old.bytes), i)
        for i, (old, new) in enumerate(zip(under, over, strict=True))
    ]
    for rate, i in sorted(gains):
        if rate < 0 and over[i].bytes - made[i].bytes <= room:
            room -= over[i].bytes - made[i].bytes
            made[i] = over[i]
    while True:
        rate, i, e, c = min(_best_change(x, made[i], room, i) for i, x in enumerate(layers))
        if not rate < 0:
            return made
        candidate_E = made[i].candidate_E.copy()
        candidate_E[e] = c
        changed = _choice(layers[i], candidate_E)
        room -= changed.bytes - made[i].bytes
        made[i] = changed


def _rate(cost: float, more: float) -> float:
    """Cost for a byte; what lowers cost and bytes goes before all else."""
    return cost / more if more > 0 else cost * STEEPEST


def _best_change(layer: Choices, choice: Choice, room: float, index: int) -> tuple[float, int, int, int]:
    """The change of one expert that lowers cost most for a byte: its rate, the layer, the expert and the candidate."""
    here = np.arange(len(choice.candidate_E)), choice.candidate_E
    cost_EC = layer.cost_EC - layer.cost_EC[here][:, None]
    more_EC = layer.bytes_C[None, :] - layer.bytes_C[choice.candidate_E][:, None]
    is_there_EC = (layer.shared_EC == -1) | np.isin(layer.shared_EC, choice.shared)
    usable_EC = is_there_EC & ~layer.gone_C & (cost_EC < 0) & (more_EC <= room)
    rate_EC = np.where(more_EC > 0, cost_EC / np.where(more_EC > 0, more_EC, 1), cost_EC * STEEPEST)
    rate_EC = np.where(usable_EC, rate_EC, 0.0)
    e, c = np.unravel_index(rate_EC.argmin(), rate_EC.shape)
    return float(rate_EC[e, c]), index, int(e), int(c)
