"""Guards of a choice (choosing.py): what has to hold beside the least cost of all text together.

Letters: E experts, C candidates, Z domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .choosing import Choices, Chosen

Pick = Callable[[Sequence[Choices]], Chosen]  # the choice for costs, within a budget that it knows
SLACK = 0.25  # how much more than the least that there can be a protected domain may lose
GROWTH = 1.5  # of a domain's weight, until that holds
LARGEST = 1e6


def without_dead_ends(pick: Pick, nothing: int, most_L: Sequence[int]) -> Pick:
    """The same, where at most so many experts of each layer become the candidate `nothing`.

    With fewer than top-k of them, no token is routed to experts that all give nothing. Those that cost least stay nothing, and the
    choice is made again without the others; one that could be nothing else keeps it.
    """

    def picked(layers: Sequence[Choices]) -> Chosen:
        while True:
            chosen = pick(layers)
            pairs = zip(layers, chosen.layers, most_L, strict=True)
            fewer = [
                _without(x, np.flatnonzero(choice.candidate_E == nothing), nothing, most) for x, choice, most in pairs
            ]
            if all(x is y for x, y in zip(fewer, layers, strict=True)):
                return chosen
            layers = fewer

    return picked


def _without(layer: Choices, found: np.ndarray, nothing: int, most: int) -> Choices:
    others_EC = np.where(layer.gone_C, np.inf, layer.cost_EC)
    others_EC[:, nothing] = np.inf
    order = found[np.argsort(layer.cost_EC[found, nothing], kind="stable")]
    forbidden = [e for e in order[most:] if np.isfinite(others_EC[e]).any()]
    if not forbidden:
        return layer
    cost_EC = layer.cost_EC.copy()
    cost_EC[forbidden, nothing] = np.inf
    return replace(layer, cost_EC=cost_EC)


def with_floors(pick: Pick, share_L: Sequence[Mapping[str, np.ndarray]], protected: Sequence[str]) -> Pick:
    """The same, where no protected domain loses more than SLACK above the least that it could lose within the budget.

    `share_L` says by domain what a unit of each expert's cost [E] is in nats per token of that domain. A domain's share of the costs counts
    more and more until it holds. Where no weight is enough, as with domains that need the same bytes, the choice is the one whose
    worst domain is best.
    """

    def weighted(layers: Sequence[Choices], weight: Mapping[str, float], whole: float) -> list[Choices]:
        made = []
        for x, share in zip(layers, share_L, strict=True):
            counts_E1 = (whole + sum(w * share[z] for z, w in weight.items()))[:, None]
            is_allowed_EC = np.isfinite(x.cost_EC)
            made.append(
                replace(x, cost_EC=np.where(is_allowed_EC, np.where(is_allowed_EC, x.cost_EC, 0) * counts_E1, np.inf))
            )
        return made

    def picked(layers: Sequence[Choices]) -> Chosen:
        least = {z: lost(layers, pick(weighted(layers, {z: 1.0}, 0.0)), share_L, z) for z in protected}
        weight, best, worst = dict.fromkeys(protected, 0.0), None, np.inf
        while max(weight.values()) < LARGEST:
            chosen = pick(weighted(layers, weight, 1.0))
            over = {z: lost(layers, chosen, share_L, z) / max((1 + SLACK) * least[z], 1e-300) for z in protected}
            if max(over.values()) < worst:
                best, worst = chosen, max(over.values())
            if worst <= 1:
                break
            weight |= {z: GROWTH * weight[z] or 0.1 for z in protected if over[z] > 1}
        return _costed(layers, best)

    return picked if protected else pick


def lost(layers: Sequence[Choices], chosen: Chosen, share_L: Sequence[Mapping[str, np.ndarray]], domain: str) -> float:
    """What a choice costs a domain, in nats per token of it."""
    return sum(
        float((cost_of(x, choice.candidate_E) * share[domain]).sum())
        for x, choice, share in zip(layers, chosen.layers, share_L, strict=True)
    )


def cost_of(layer: Choices, candidate_E: np.ndarray) -> np.ndarray:
    """[E] what each expert's candidate costs."""
    return layer.cost_EC[np.arange(len(candidate_E)), candidate_E]


def _costed(layers: Sequence[Choices], chosen: Chosen) -> Chosen:
    """A choice that was made by weighted costs, with the true ones. There may be a better one: it has no bound."""
    pairs = zip(layers, chosen.layers, strict=True)
    return Chosen([replace(choice, cost=float(cost_of(x, choice.candidate_E).sum())) for x, choice in pairs], -np.inf)
