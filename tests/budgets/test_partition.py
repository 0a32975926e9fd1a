"""Groups of experts that are used together: a planted partition is found, against the best of all partitions where few.

Letters: E experts.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from locum.budgets.partition import inside, partition


def planted(groups: list[int], seed: int) -> torch.Tensor:
    """Experts of one group together three times as often as others, with noise."""
    generator = torch.Generator().manual_seed(seed)
    group_E = torch.tensor(groups)
    return 1 + torch.rand(len(groups), len(groups), generator=generator) + 4 * (group_E[:, None] == group_E)


@pytest.mark.parametrize(("experts", "count"), [(8, 2), (12, 3), (64, 8), (32, 32), (16, 1)])
def test_a_planted_partition_is_found(experts, count):
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(experts)).tolist()
    groups = [e % count for e in order]
    found = partition(planted(groups, 1), count)
    assert {tuple(sorted(e for e in range(experts) if found[e] == g)) for g in range(count)} == {
        tuple(sorted(e for e in range(experts) if groups[e] == g)) for g in range(count)
    }
    assert list(dict.fromkeys(found)) == list(range(count))  # numbered as they come


@pytest.mark.parametrize("seed", range(6))
def test_it_is_as_good_as_the_best_of_all_halves(seed):
    together = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together = (together + together.T).fill_diagonal_(0)
    halves = [torch.tensor([e in half for e in range(8)]).long() for half in itertools.combinations(range(8), 4)]
    best = max(inside(together, half) for half in halves)
    assert inside(together, torch.tensor(partition(together, 2))) >= 0.97 * best


def test_sizes_differ_by_one_at_most_and_nothing_together_is_no_error():
    for together in (torch.rand(11, 11, generator=torch.Generator().manual_seed(0)), torch.zeros(11, 11)):
        found = partition(together, 3)
        assert sorted(found.count(group) for group in range(3)) == [3, 4, 4]
    assert not together.any()  # what was given is as it was
