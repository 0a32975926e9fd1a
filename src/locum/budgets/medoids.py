"""Which experts of a layer may be bases of others: medoids of their weights.

The medoids of a layer are some of its experts, such that the distances of all experts from the nearest one add up to little:
|W_i - W_j|^2, each expert's matrices as one long vector, from the statistic `weight_product`. They are chosen one after the other, each the
one that lowers the sum most, and experts then change places while that helps (PAM, Kaufman and Rousseeuw 1990).

How many there are is not known. One always is a way to group the experts. Another is the number behind the steepest fall of the sum: of
experts that are near-copies in K groups, the sum is large for K - 1 medoids and small for K. Of unrelated experts no number stands out.

Letters: E experts.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

FALL = 3.0  # by which one medoid more divides the sum, at least; of unrelated experts the last one halves it
LEAST = 1e-6  # of the sum for one medoid: what is less is nothing


def groupings(product_EE: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of each way to group a layer's experts, the medoid of every expert [E]: with one medoid, and with as many as stand out, if any.

    Experts that are medoids are their own. Of equals the first one.
    """
    product_EE = product_EE.numpy()
    square_E = product_EE.diagonal()
    distance_EE = np.maximum(square_E[:, None] + square_E[None, :] - 2 * product_EE, 0)
    np.fill_diagonal(distance_EE, 0)
    if not np.isfinite(distance_EE).all():
        return (tuple([0] * len(square_E)),)  # what such weights are, those say who read them
    medoids, sums = _one_by_one(distance_EE)
    found = [_nearest(distance_EE, _exchanged(distance_EE, medoids[:1]))]
    sums = np.maximum(sums, LEAST * max(sums[0], 1e-300))
    falls = sums[:-1] / sums[1:]
    if len(falls) > 1 and falls[:-1].max() >= FALL:  # the last one leaves no expert to share a base
        count = int(falls[:-1].argmax()) + 2
        found.append(_nearest(distance_EE, _exchanged(distance_EE, medoids[:count])))
    return tuple(found)


def _one_by_one(distance_EE: np.ndarray) -> tuple[list[int], np.ndarray]:
    """All experts in the order in which each lowers the sum most, and the sums."""
    nearest_E, medoids, sums = np.full(len(distance_EE), np.inf), [], []
    for _ in range(len(distance_EE)):
        sum_E = np.minimum(distance_EE, nearest_E[:, None]).sum(0)
        sum_E[medoids] = np.inf
        medoids.append(int(sum_E.argmin()))
        nearest_E = np.minimum(nearest_E, distance_EE[:, medoids[-1]])
        sums.append(nearest_E.sum())
    return medoids, np.array(sums)


def _exchanged(distance_EE: np.ndarray, medoids: list[int]) -> list[int]:
    """The medoids after every exchange with another expert that lowers the sum."""
    made, least = list(medoids), distance_EE[:, medoids].min(1).sum()
    is_better = True
    while is_better:
        is_better = False
        for i in range(len(made)):
            others_E = distance_EE[:, made[:i] + made[i + 1 :]].min(1, initial=np.inf)
            sum_E = np.minimum(distance_EE, others_E[:, None]).sum(0)
            if sum_E.min() < least * (1 - 1e-9):
                made[i], least, is_better = int(sum_E.argmin()), sum_E.min(), True
    return sorted(made)


def _nearest(distance_EE: np.ndarray, medoids: list[int]) -> tuple[int, ...]:
    nearest_E = np.array(medoids)[distance_EE[:, medoids].argmin(1)]
    nearest_E[medoids] = medoids
    return tuple(nearest_E.tolist())
