"""Quantisers: which levels of a number format stand for a matrix.

    nearest  each number's nearest level; scales are searched so that this loses least (formats/int_groups.py)
    gptq     column by column, what rounding one column lost is made up for by those that come after it (GPTQ, arXiv 2210.17323)

gptq knows whole numbers in groups. It minimises the error on what the matrix is given,

    E(W') = trace (W - W') G (W - W')^T,      G = the mean of x x^T over the inputs x,

and of each row of the matrix, whose errors do not mix, the better of gptq and nearest is taken. So E is never above that of nearest.

Experts that saw few tokens borrow: `shrunk` adds to their Gram matrix that of BORROWED tokens for each input of the matrix, such as
the layer gave its experts on average.

Letters: O outputs, I inputs, J inputs of a group, E experts, D model width, F expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..formats.format import Format
from ..formats.int_groups import Grid, IntGroups
from ..formats.rows import pack, row_format

DAMPING = 0.01  # of the mean diagonal of a Gram matrix, added to its diagonal: the value of the paper
BORROWED = 0.125  # tokens of the layer's mean, for each input


class Written(NamedTuple):
    """A matrix in a number format: its bytes, and the numbers that they stand for."""

    stored: Tensor
    numbers: Tensor


class Gram:
    """The mean of x x^T over the inputs of matrices, and what gptq makes of it, which is made once for all of them and all formats."""

    def __init__(self, matrix_II: Tensor) -> None:
        self.matrix_II = matrix_II.double()

    @functools.cached_property
    def upper_II(self) -> Tensor:
        """U with U^T U = the inverse of the damped matrix: its row c, from c on, is what the inverse has of the columns that are left
        when c is reached."""
        scale = float(self.matrix_II.diagonal().mean())
        unit_II = torch.eye(len(self.matrix_II)).to(self.matrix_II)
        damped_II = self.matrix_II + unit_II * (DAMPING * scale if scale > 0 else 1.0)
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)


Write = Callable[[Tensor, Gram | None], Written]  # a matrix [O, I], and the Gram matrix of its inputs where it is known


class Quantiser(NamedTuple):
    needs: tuple[str, ...]  # statistics
    only: type | None  # the one kind of format that it knows
    parts: Callable[[Tensor, Gram | None, Format], dict[str, Tensor]]


def gptq(weight_OI: Tensor, gram: Gram, format: IntGroups) -> dict[str, Tensor]:
    """The parts of a matrix by GPTQ, in the order of its columns. The levels of a group are chosen when it is reached."""
    rest_OI, columns = weight_OI.to(torch.float64, copy=True), weight_OI.shape[1]
    upper_II = gram.upper_II.to(rest_OI.device)
    price_I = (
        upper_II.diagonal().square().reciprocal()
    )  # of a column's squared error, once all later ones made up for it
    codes, grids = [], []
    for begin in range(0, columns, format.group):
        end = min(begin + format.group, columns)
        price = (price_I[begin:end] / price_I.max()).float()
        grid = format.grid(rest_OI[:, begin:end].float(), price)
        code, lost = _in_order(rest_OI[:, begin:end], upper_II[begin:end, begin:end], format, grid)
        rest_OI[:, end:] -= lost @ upper_II[begin:end, end:]
        codes.append(code)
        grids.append(grid)
    return format.packed(torch.cat(codes, 1), format.joined(grids))


def _in_order(rest_OJ: Tensor, upper_JJ: Tensor, format: IntGroups, grid: Grid) -> tuple[Tensor, Tensor]:
    """The codes of a group's columns, one column after the other, and what each of them lost.

    `IntGroups.codes` and `numbers` in numpy, to the same bits: single columns are so small that calling torch would take most of the time.
    """
    rest_JO, upper_JJ = rest_OJ.T.cpu().numpy().copy(), upper_JJ.cpu().numpy()
    scale_O, low_O = (None if x is None else x[:, 0].cpu().numpy() for x in grid)
    half, divisor_O = np.float32(2 ** (format.bits - 1)), np.where(scale_O == 0, np.float32(1), scale_O)
    code_JO, lost_JO = np.empty(rest_JO.shape, np.float32), np.empty_like(rest_JO)
    for j, column_O in enumerate(rest_JO):
        wide_O = column_O.astype(np.float32)
        code_O = wide_O / divisor_O + half if low_O is None else (wide_O - low_O) / divisor_O
        code_O = np.where(scale_O == 0, half, np.rint(code_O).clip(0, 2 * half - 1))
        number_O = (code_O - half) * scale_O if low_O is None else code_O * scale_O + low_O
        code_JO[j], lost_JO[j] = code_O, (column_O - number_O) / upper_JJ[j, j]
        rest_JO[j + 1 :] -= upper_JJ[j, j + 1 :, None] * lost_JO[j]
    return tuple(torch.from_numpy(x).T.to(rest_OJ.device) for x in (code_JO, lost_JO))


def errors(weight_OI: Tensor, numbers_OI: Tensor, gram_II: Tensor) -> Tensor:
    """What each row of a matrix loses on inputs with this Gram matrix [O], in float64."""
    lost_OI = weight_OI.double() - numbers_OI.double()
    return (lost_OI @ gram_II.to(lost_OI) * lost_OI).sum(1)


def _nearest(weight: Tensor, gram: Gram | None, format: Format) -> dict[str, Tensor]:
    return format.write(weight.float())


def _gptq(weight: Tensor, gram: Gram | None, format: Format) -> dict[str, Tensor]:
    near = format.write(weight.float())
    if gram is None or not isinstance(format, IntGroups):
        return near
    found = gptq(weight, gram, format)
    error_O, least_O = (errors(weight, format.read(x)[:, : weight.shape[1]], gram.matrix_II) for x in (found, near))
    better_O1 = (error_O < least_O)[:, None]
    return {part: torch.where(better_O1, found[part], near[part]) for part in near}


QUANTISERS: dict[str, Quantiser] = {
    "nearest": Quantiser((), None, _nearest),
    "gptq": Quantiser(("input_gram", "hidden_gram", "count"), IntGroups, _gptq),
}


def writer(format: str, quantiser: str) -> Write:
    """What writes matrices in a format."""
    item, made = row_format(format), QUANTISERS[quantiser].parts

    def write(weight: Tensor, gram: Gram | None) -> Written:
        parts = made(weight, gram, item)
        return Written(pack(format, parts), item.read(parts)[:, : weight.shape[1]].to(weight.dtype))

    return write


def shrunk(gram_II: Tensor, tokens: float, mean_II: Tensor) -> Tensor:
    """The mean of x x^T over the tokens of an expert and as many of the layer's as it borrows: (G + k M) / (n + k), where G is
    the sum over its n tokens, M the mean over the layer's, and k = BORROWED I. Without a token it is the layer's mean."""
    borrowed = BORROWED * len(gram_II)
    return (gram_II + borrowed * mean_II) / (tokens + borrowed)


def layer_means(input_EDD: Iterable[Tensor], hidden_EFF: Iterable[Tensor], count_E: Tensor) -> tuple[Tensor, float]:
    """What experts borrow of their layer: the mean of x x^T over what it gives them, and the mean square of a hidden unit. The Gram
    matrices come one by one, as all of them may be more than memory holds."""
    tokens = float(count_E.sum().clamp(min=1))
    inputs = iter(input_EDD)
    total_DD = next(inputs).clone()
    for input_DD in inputs:
        total_DD += input_DD
    return total_DD / tokens, sum(float(hidden_FF.diagonal().mean()) for hidden_FF in hidden_EFF) / tokens


def seen_by(sums: Mapping[str, Tensor], tokens: float, mean_input_DD: Tensor, mean_hidden: float) -> dict[str, Tensor]:
    """The mean Gram matrices of the inputs of an expert's weights, by the weight's name, with what it borrows.

    Hidden units are an expert's own: of those, it borrows their mean square over the layer and no products. `sums` are over the
    expert's tokens.
    """
    input_DD, hidden_FF = sums["up_FD"], sums["down_DF"]
    inputs = shrunk(input_DD, tokens, mean_input_DD)
    unit_FF = torch.eye(len(hidden_FF)).to(hidden_FF)
    return {"gate_FD": inputs, "up_FD": inputs, "down_DF": shrunk(hidden_FF, tokens, mean_hidden * unit_FF)}
