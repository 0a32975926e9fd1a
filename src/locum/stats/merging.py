"""How two values of a statistic become one, over batches, domains, ranks and files.

sum    they add up
max    the larger one; such values are at least 0, so that zeros are what nothing was seen of
same   they are equal, because they describe the model and not the text: one of them is kept, for all domains
sample rows of numbers, of which as many are kept as one has: those with the largest keys, which their own numbers make. So it
       does not matter in which order samples are merged; rows of zeros are no rows

Letters: U rows of a sample, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ranks
from .definitions import STATISTICS

SAMPLE_ROWS = 512
ODD, MIX, AGAIN = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of splitmix64


def merge_of(name: str) -> str:
    """How a statistic merges. One of a package that is not installed adds up."""
    return STATISTICS[name].merge if name in STATISTICS else "sum"


def merge_into(total: Tensor, more: Tensor, rule: str) -> Tensor:
    """`more` merged into `total`, in place. NaN stays NaN."""
    if rule == "sum":
        return total.add_(more)
    if rule == "sample":
        return total.copy_(sample_of(torch.cat([total, more], dim=-2)))
    return torch.maximum(total, more, out=total) if rule == "max" else total


def over_domains(by_domain: Tensor, rule: str) -> Tensor:
    """[...] of all domains together, from [Z, ...]. Letters: Z domains."""
    if len(by_domain) == 1 or rule == "same":
        return by_domain[0]
    if rule == "sample":
        return sample_of(by_domain.flatten(0, 1))
    return by_domain.sum(dim=0) if rule == "sum" else by_domain.amax(dim=0)


def over_ranks(total: Tensor, rule: str) -> Tensor:
    """A tensor on the host, merged with those of the other ranks. Every rank must ask."""
    if rule != "sample" or ranks.count() == 1:
        return ranks.merge(total, rule)
    return sample_of(torch.cat(ranks.divide(range(ranks.count()), lambda _: total), dim=-2))


def sample_of(rows: Tensor) -> Tensor:
    """[..., SAMPLE_ROWS, D] of rows [..., U, D]: those with the largest keys, the largest first, and zeros where there are fewer."""
    missing = max(0, SAMPLE_ROWS - rows.shape[-2])
    rows = torch.cat([rows, rows.new_zeros(*rows.shape[:-2], missing, rows.shape[-1])], dim=-2)
    chosen = _keys(rows).topk(SAMPLE_ROWS, dim=-1).indices
    return rows.gather(-2, chosen[..., None].expand(*chosen.shape, rows.shape[-1]))


def _keys(rows: Tensor) -> Tensor:
    """[..., U] whole numbers that look drawn at random, from each row alone; 0 for a row of zeros.

    They are made of the bits that the numbers have in bfloat16: the lower bits of float64 would be zero for narrow numbers, and
    what rounding changes should not change which rows are kept.
    """
    odd_D = (2 * torch.arange(rows.shape[-1], device=rows.device) + 1) * ODD
    bits = rows.to(torch.bfloat16).view(torch.int16).long()
    return _mixed(_mixed(bits * odd_D).sum(dim=-1)) & (2**62 - 1)


def _mixed(number: Tensor) -> Tensor:
    """The last steps of splitmix64, with shifts that keep the sign; 0 stays 0."""
    for shift, factor in ((30, MIX), (27, AGAIN)):
        number = (number ^ (number >> shift)) * factor
    return number ^ (number >> 31)
