"""How two values of a statistic become one, over batches, domains, ranks and files.

sum    they add up
max    the larger one; such values are at least 0, so that zeros are what nothing was seen of
same   they are equal, because they describe the model and not the text: one of them is kept, for all domains
"""

from __future__ import annotations

import torch
from torch import Tensor

from .definitions import STATISTICS


def merge_of(name: str) -> str:
    """How a statistic merges. One of a package that is not installed adds up."""
    return STATISTICS[name].merge if name in STATISTICS else "sum"


def merge_into(total: Tensor, more: Tensor, rule: str) -> Tensor:
    """`more` merged into `total`, in place. NaN stays NaN."""
    if rule == "sum":
        return total.add_(more)
    return torch.maximum(total, more, out=total) if rule == "max" else total


def over_domains(by_domain: Tensor, rule: str) -> Tensor:
    """[...] of all domains together, from [Z, ...]. Letters: Z domains."""
    if len(by_domain) == 1 or rule == "same":
        return by_domain[0]
    return by_domain.sum(dim=0) if rule == "sum" else by_domain.amax(dim=0)
