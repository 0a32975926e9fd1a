"""Masks: which of a matrix's weights become zero, and what the others become then.

    magnitude   the smallest |w|
    wanda       the smallest |w_oi| ||x_i||_2, over the inputs that the expert got (Wanda, arXiv 2306.11695)
    moe-pruner  the same with each input times its gate: ||g x_i||_2 (MoE-Pruner, arXiv 2410.12013)
    sparsegpt   column by column; what a zero takes away is made up for by the columns that come after it (SparseGPT, arXiv 2301.00774)

A pattern says how many: "N:M" leaves N of every M inputs that lie side by side, of each row of the matrix; a share such as "0.5"
makes so many of each row zero (of sparsegpt: of each block of BLOCK inputs, over all rows).

sparsegpt minimises trace (W - W') G (W - W')^T, G the Gram matrix of the inputs, as GPTQ does (quantisers.py); experts that saw
few tokens borrow of the layer's in the same way. An expert that no token selected has no inputs: its weights go by their size.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .quantisers import DAMPING

BLOCK = 128  # inputs among which sparsegpt chooses, as in its code


@dataclass(frozen=True)
class Pattern:
    """How many of how many inputs are zero."""

    gone: float  # of each group
    group: int = 0  # inputs side by side; 0: all of a row, of which `gone` is the share

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Raises OptionError for what is no pattern."""
        if found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", str(text)):
            left, group = int(found[1]), int(found[2])
            if 0 < left < group:
                return cls(group - left, group)
        elif re.fullmatch(r"0?\.\d{1,6}", str(text)) and float(text) > 0:
            return cls(float(text))
        raise OptionError(
            f"pattern {text!r} is not known; write how many of how many weights side by side stay, such as 2:4 or 4:8, or the "
            f"share that becomes zero, such as 0.5"
        )

    def count(self, inputs: int) -> int:
        """Zeros among so many inputs of a group, or of a row: fewer where a row ends within a group."""
        return int(inputs * (self.gone / self.group if self.group else self.gone) + 1e-9)


def lowest(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """[O, I] bools, true where a score is among the lowest of its group. Of equal ones the first."""
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    for begin in range(0, score_OI.shape[1], pattern.group or score_OI.shape[1]):
        end = min(begin + (pattern.group or score_OI.shape[1]), score_OI.shape[1])
        order_OI = score_OI[:, begin:end].sort(dim=1, stable=True).indices
        mask_OI[:, begin:end].scatter_(1, order_OI[:, : pattern.count(end - begin)], True)
    return mask_OI


def by_norms(weight_OI: Tensor, square_I: Tensor | None, pattern: Pattern) -> Tensor:
    """The matrix with zeros where |w| times the root of `square_I` is smallest; without any input, where |w| is."""
    score_OI = weight_OI.double().abs()
    if square_I is not None and bool((square_I > 0).any()):
        score_OI = score_OI * square_I.to(score_OI).sqrt()
    return weight_OI.masked_fill(lowest(score_OI, pattern), 0)


def sparsegpt(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """The matrix with zeros, and the weights after them changed so that least is lost on inputs with this Gram matrix."""
    rest_OI, columns = weight_OI.to(torch.float64, copy=True), weight_OI.shape[1]
    gram_II = gram_II.to(rest_OI)
    scale = float(gram_II.diagonal().mean())
    damped_II = gram_II + torch.eye(columns).to(gram_II) * (DAMPING * scale if scale > 0 else 1.0)
    # U with U^T U = the inverse: its row c, from c on, is what the inverse has of the columns that are left when c is reached.
    upper_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)
    diagonal_I = upper_II.diagonal()
    group = pattern.group or BLOCK
    for begin in range(0, columns, group):
        end = min(begin + group, columns)
        score = (rest_OI[:, begin:end] / diagonal_I[begin:end]).square()
        mask = lowest(score, pattern) if pattern.group else _lowest_of_all(score, pattern.count(score.numel()))
        for c in range(begin, end):
            lost_O = torch.where(mask[:, c - begin], rest_OI[:, c], 0) / diagonal_I[c]
            rest_OI[:, c:] -= lost_O[:, None] * upper_II[c, c:]
        rest_OI[:, begin:end].masked_fill_(mask, 0)  # to the bit
    return rest_OI.to(weight_OI.dtype)


def _lowest_of_all(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[score.reshape(-1).sort(stable=True).indices[:count]] = True
    return mask.view(score.shape)


class Mask(NamedTuple):
    """Where a mask's numbers come from: sums of squares of the inputs of gate and up, and of down, or Gram matrices."""

    needs: tuple[str, ...]  # statistics
    squares: tuple[str, str] | None = None  # of the first product's inputs, and of the second's
    masked: Callable[[Tensor, Tensor | None, Pattern], Tensor] = by_norms


MASKS: dict[str, Mask] = {
    "magnitude": Mask(()),
    "wanda": Mask(("input_square", "hidden_square"), ("input_square", "hidden_square")),
    "moe-pruner": Mask(("gated_input_square", "gated_hidden_square"), ("gated_input_square", "gated_hidden_square")),
    "sparsegpt": Mask(("input_gram", "hidden_gram", "count"), None, sparsegpt),
}
