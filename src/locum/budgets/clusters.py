"""Clusters of experts by how far apart they are: a tree of joins, cut where few enough clusters are left.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

LINKAGES = ("average", "single", "complete")


@dataclass(frozen=True, eq=False)
class Tree:
    """In which order experts join. Those that no token selected join first, each the used expert that is nearest to it."""

    used: Sequence[int]
    joins: np.ndarray  # of those that are used: scipy's linkage matrix
    idle: Sequence[
        tuple[int, int]
    ]  # an expert that no token selected, and the used one nearest to it; the nearest pair first

    def groups(self, left: int) -> list[list[int]]:
        """So many groups of experts, each in ascending order; the group with the first expert comes first."""
        gone = len(self.used) + len(self.idle) - left
        joining, alone = self.idle[:gone], self.idle[gone:]
        groups = {number: [e] for number, e in enumerate(self.used)}
        for step, (one, two) in enumerate(self.joins[: gone - len(joining), :2].astype(int)):
            groups[len(self.used) + step] = groups.pop(one) + groups.pop(two)
        for e, nearest in joining:
            next(group for group in groups.values() if nearest in group).append(e)
        return sorted([*(sorted(group) for group in groups.values()), *([e] for e, _ in alone)])


def tree(distance_EE: Tensor, count_E: Tensor, how: str = "average") -> Tree:
    """The tree of a layer's experts. `count_E` says how often each was selected; `how` is one of LINKAGES: how far apart two
    clusters are, of all pairs of members. Where no token selected any, all count as used."""
    far_EE = distance_EE.double().numpy()
    used = count_E.nonzero().flatten().tolist() or list(range(len(far_EE)))
    idle = [e for e in range(len(far_EE)) if e not in used]
    nearest = [(e, used[int(np.argmin(far_EE[e, used]))]) for e in idle]
    nearest.sort(key=lambda pair: (far_EE[pair], pair[0]))
    joins = linkage(squareform(far_EE[np.ix_(used, used)], checks=False), how) if len(used) > 1 else np.zeros((0, 4))
    return Tree(used, joins, nearest)
