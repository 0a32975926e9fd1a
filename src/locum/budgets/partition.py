"""Experts in groups of equal size, so that those that are used together lie together: balanced graph partition by swaps.

Letters: E experts, J groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def partition(together_EE: Tensor, count: int) -> tuple[int, ...]:
    """The group of every expert: `count` groups whose sizes differ by one at most, with as much inside of them as swaps can reach.

    `together_EE` says how much two experts belong together; its diagonal does not count. From two starts, groups of neighbours and
    groups that grow around their first member, the best swap of two experts is made until none gains; the better end is taken.
    Groups are numbered in the order of their first experts.
    """
    together_EE = (together_EE + together_EE.T).double() / 2
    together_EE.fill_diagonal_(0)
    ends = [_swapped(together_EE, start) for start in (_in_order(together_EE, count), _grown(together_EE, count))]
    best = max(ends, key=lambda group_E: inside(together_EE, group_E))
    first = {group: number for number, group in enumerate(dict.fromkeys(best.tolist()))}
    return tuple(first[group] for group in best.tolist())


def inside(together_EE: Tensor, group_E: Tensor) -> float:
    """How much lies inside groups."""
    return float(together_EE[group_E[:, None] == group_E].sum())


def _sizes(experts: int, count: int) -> list[int]:
    return [experts // count + (j < experts % count) for j in range(count)]


def _in_order(together_EE: Tensor, count: int) -> Tensor:
    sizes = torch.tensor(_sizes(len(together_EE), count))
    return torch.arange(count).repeat_interleave(sizes)


def _grown(together_EE: Tensor, count: int) -> Tensor:
    """Groups one after the other: the expert with most left, then whoever has most in common with the group."""
    group_E = torch.full((len(together_EE),), -1)
    for group, size in enumerate(_sizes(len(together_EE), count)):
        for _ in range(size):
            free_E = group_E < 0
            members = group_E == group
            pull_E = together_EE[:, members if bool(members.any()) else free_E].sum(dim=1)
            group_E[int(pull_E.masked_fill(~free_E, -torch.inf).argmax())] = group
    return group_E


def _swapped(together_EE: Tensor, group_E: Tensor) -> Tensor:
    """The groups after the best swap of two experts, again and again, until none gains."""
    group_E = group_E.clone()
    scale = float(together_EE.abs().max()) or 1.0
    while True:
        member_EJ = functional.one_hot(group_E).double()
        pull_EJ = together_EE @ member_EJ  # of every group on every expert
        to_EE = pull_EJ[:, group_E]
        own_E = to_EE.diagonal()
        gain_EE = to_EE + to_EE.T - own_E[:, None] - own_E - 2 * together_EE
        gain_EE.masked_fill_(group_E[:, None] == group_E, -torch.inf)
        best = int(gain_EE.argmax())
        one, two = divmod(best, len(group_E))
        if not gain_EE[one, two] > 1e-9 * scale:
            return group_E
        group_E[[one, two]] = group_E[[two, one]]
