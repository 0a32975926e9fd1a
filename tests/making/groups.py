"""Which experts a plan makes one, and the slow way to find clusters."""

from __future__ import annotations

import itertools

import pytest

from locum.plans.plan import KEPT, LayerPlan, stand_in
from making.slots import base_of


def groups_of(layer: LayerPlan) -> list[tuple[int, ...]]:
    """The experts that become one, and those that stay, each by itself."""
    assert all(slot == KEPT or slot == stand_in(base=base_of(slot)) for slot in layer.slots)
    alone = [(e,) for e, slot in enumerate(layer.slots) if slot.is_kept]
    return sorted([*alone, *(base.experts for base in layer.bases)])


def assert_weights(layer: LayerPlan, counts: list[float]) -> None:
    for base in layer.bases:
        assert base.weights == pytest.approx([counts[e] / sum(counts[i] for i in base.experts) for e in base.experts])


def joined(far: list[list[float]], how: str, left: int) -> list[list[int]]:
    """Join the two clusters that are nearest, by all pairs of members, until few enough are left."""
    reduce = {"average": lambda values: sum(values) / len(values), "single": min, "complete": max}[how]
    clusters = [[e] for e in range(len(far))]
    while len(clusters) > left:
        pairs = itertools.combinations(range(len(clusters)), 2)
        i, j = min(pairs, key=lambda p: reduce([far[a][b] for a in clusters[p[0]] for b in clusters[p[1]]]))
        clusters[i] += clusters.pop(j)
    return clusters
