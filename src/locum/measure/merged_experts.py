"""Trying a model whose experts are mixtures of each other, in place, for a while.

Letters: E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ..experts.weights import mean_expert
from ..models.families import MoeLayer, read_expert, write_expert


@contextlib.contextmanager
def merged_experts(layer: MoeLayer, weight_EE: Tensor) -> Iterator[None]:
    """While it is entered, expert e of a layer has sum_i weight[e, i] W_i in place of W_e; rows that are zero change nothing.

    Every expert that is used is copied. Afterwards all have the very numbers that they had.
    """
    changed = [e for e, weight_E in enumerate(weight_EE) if bool(weight_E.any()) and float(weight_E[e]) != 1]
    used = {*changed, *weight_EE[changed].any(dim=0).nonzero().flatten().tolist()}
    before = {e: read_expert(layer.experts, e).map(lambda _, tensor: tensor.clone()) for e in sorted(used)}
    try:
        for e in changed:
            members = weight_EE[e].nonzero().flatten().tolist()
            write_expert(layer.experts, e, mean_expert((before[i] for i in members), weight_EE[e, members].tolist()))
        yield
    finally:
        for e in changed:
            write_expert(layer.experts, e, before[e])
