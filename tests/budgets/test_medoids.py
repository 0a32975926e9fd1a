"""Medoids of a layer's weights: against all sets of them, and groups that are planted.

Letters: E experts, N numbers of an expert.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from locum.budgets.medoids import groupings


def in_groups(group_E: list[int], noise: float, seed: int = 0) -> Tensor:
    """[E, N] experts that are near-copies within each group."""
    drawn = torch.Generator().manual_seed(seed)
    of_group = torch.randn(max(group_E) + 1, 50, generator=drawn, dtype=torch.float64)
    return of_group[group_E] + noise * torch.randn(len(group_E), 50, generator=drawn, dtype=torch.float64)


def distances(weights_EN: Tensor) -> Tensor:
    return (weights_EN[:, None] - weights_EN[None]).square().sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_medoids_are_the_best_of_all_sets(seed: int) -> None:
    group_E = [0, 1, 2, 0, 1, 2, 0, 2]
    weights_EN = in_groups(group_E, 0.1, seed)
    distance_EE, found = distances(weights_EN), groupings(weights_EN @ weights_EN.T)
    assert len(found) == 2
    for medoid_E, count in zip(found, (1, 3), strict=True):
        sums = {m: float(distance_EE[:, m].min(1).values.sum()) for m in itertools.combinations(range(8), count)}
        best = min(sums, key=sums.__getitem__)
        assert tuple(sorted(set(medoid_E))) == best
        assert all(medoid_E[m] == m for m in best)
        assert [distance_EE[e, m] for e, m in enumerate(medoid_E)] == distance_EE[:, best].min(1).values.tolist()


@pytest.mark.parametrize("group_E", [[0, 0, 0, 0, 1, 1, 1, 1], [3, 1, 0, 2, 1, 3, 2, 0], [0, 1, 2, 3, 4, 5, 6, 0]])
@pytest.mark.parametrize("noise", [0, 1e-3, 0.1])
def test_groups_that_are_planted_are_found(group_E: list[int], noise: float) -> None:
    weights_EN = in_groups(group_E, noise)
    one, several = groupings(weights_EN @ weights_EN.T)
    assert len(set(one)) == 1
    assert all((several[i] == several[j]) == (group_E[i] == group_E[j]) for i in range(8) for j in range(8))


def test_where_no_number_stands_out_there_is_one_group() -> None:
    for weights_EN in (in_groups(list(range(8)), 0), in_groups([0] * 8, 0.1), torch.zeros(8, 5), torch.ones(1, 5)):
        assert [len(set(found)) for found in groupings(weights_EN.double() @ weights_EN.double().T)] == [1]
