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

import torch
from torch import Tensor

from ..formats.format import Format
from ..formats.int_groups import Grid, IntGroups
from ..formats.rows import pack, row_format
from ..kernels.rounding import in_order, least

DAMPING = 0.01  # of the mean diagonal of a Gram matrix, added to its diagonal: the value of the paper
BORROWED = 0.125  # tokens of the layer's mean, for each input
TOGETHER = 128  # columns, whole groups: what they lost reaches those after them in one product
DOUBT = 0.01  # of two errors, the difference that float32 does not say


class Written(NamedTuple):
    """A matrix in a number format: its bytes, and the numbers that they stand for."""

    stored: Tensor
    numbers: Tensor


class Gram:
    """The mean of x x^T over the inputs of matrices, and what gptq makes of it, which is made once for all of them and all formats."""

    def __init__(self, matrix_II: Tensor) -> None:
        self.matrix_II = matrix_II.double()

    @functools.cached_property
    def damping(self) -> float:
        scale = float(self.matrix_II.diagonal().mean())
        return DAMPING * scale if scale > 0 else 1.0

    @functools.cached_property
    def upper_II(self) -> Tensor:
        """U with U^T U = the inverse of the damped matrix: its row c, from c on, is what the inverse has of the columns that are left
        when c is reached."""
        damped_II = self.matrix_II + torch.eye(len(self.matrix_II)).to(self.matrix_II) * self.damping
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)


Write = Callable[[Tensor, Gram | None], Written]  # a matrix [O, I], and the Gram matrix of its inputs where it is known


class Quantiser(NamedTuple):
    needs: tuple[str, ...]  # statistics
    only: type | None  # the one kind of format that it knows
    parts: Callable[[Tensor, Gram | None, Format], dict[str, Tensor]]


class Rounded(NamedTuple):
    """A matrix by GPTQ: its parts, and of each row what it loses [O], with and without the damping."""

    parts: dict[str, Tensor]
    damped_O: Tensor
    error_O: Tensor


def gptq(weight_OI: Tensor, gram: Gram, format: IntGroups) -> Rounded:
    """By GPTQ, in the order of the columns. The levels of a group are chosen when it is reached.

    The squares of what columns lost, each over the diagonal of U, add up to trace (W - W') (G + d I) (W - W')^T.
    """
    rest_OI, columns = weight_OI.to(torch.float64, copy=True), weight_OI.shape[1]
    upper_II = gram.upper_II.to(rest_OI.device)
    price_I = (
        upper_II.diagonal().square().reciprocal()
    )  # of a column's squared error, once all later ones made up for it
    codes, grids, losses = [], [], []
    damped_O, square_O = torch.zeros_like(rest_OI[:, 0]), torch.zeros_like(rest_OI[:, 0])
    for begin in range(0, columns, format.group):
        here = slice(begin, min(begin + format.group, columns))
        near = slice(here.stop, min(begin - begin % TOGETHER + TOGETHER, columns))
        price = (price_I[here] / price_I.max()).float()
        grid = format.grid(rest_OI[:, here].float(), price, least)
        code, lost = _in_order(rest_OI[:, here], upper_II[here, here], format, grid)
        losses.append(lost)
        rest_OI[:, near].addmm_(lost, upper_II[here, near], alpha=-1)
        if here.stop == near.stop:  # all further columns make up for these together
            far, lost_OJ = slice(near.stop - sum(x.shape[1] for x in losses), near.stop), torch.cat(losses, 1)
            rest_OI[:, near.stop :].addmm_(lost_OJ, upper_II[far, near.stop :], alpha=-1)
            losses = []
        damped_O += lost.square().sum(1)
        square_O += (weight_OI[:, here] - format.numbers(code, grid)).double().square().sum(1)
        codes.append(code)
        grids.append(grid)
    parts = format.packed(torch.cat(codes, 1), format.joined(grids))
    return Rounded(parts, damped_O, damped_O - gram.damping * square_O)


def _in_order(rest_OJ: Tensor, upper_JJ: Tensor, format: IntGroups, grid: Grid) -> tuple[Tensor, Tensor]:
    """The codes of a group's columns, one column after the other, and what each of them lost: `IntGroups.codes` and `numbers`, to the same
    bits, in few calls for a column. Where the processor can, in one call for all."""
    half = 2 ** (format.bits - 1)
    if (found := in_order(rest_OJ, upper_JJ, grid, half)) is not None:
        return found
    rest_JO, scale_O = rest_OJ.T.contiguous(), grid.scale[:, 0]
    low_O = -half * scale_O if grid.minimum is None else grid.minimum[:, 0]  # the number of code 0
    divisor_O = torch.where(scale_O == 0, 1.0, scale_O)
    code_JO, lost_JO = torch.empty_like(rest_JO, dtype=torch.float32), torch.empty_like(rest_JO)
    for j, column_O in enumerate(rest_JO):
        wide_O = column_O.float()
        code_O = wide_O / divisor_O + half if grid.minimum is None else (wide_O - low_O) / divisor_O
        code_JO[j] = code_O.round_().clamp_(0, 2 * half - 1)
        torch.div(column_O - (code_O * scale_O + low_O), upper_JJ[j, j], out=lost_JO[j])
        rest_JO[j + 1 :] -= upper_JJ[j, j + 1 :, None] * lost_JO[j]
    return torch.where(scale_O == 0, float(half), code_JO).T, lost_JO.T


def errors(weight_OI: Tensor, numbers_OI: Tensor, gram_II: Tensor) -> Tensor:
    """What each row of a matrix loses on inputs with this Gram matrix [O], in float64."""
    lost_OI = weight_OI.double() - numbers_OI.double()
    return (lost_OI @ gram_II.to(lost_OI) * lost_OI).sum(1)


def _nearest(weight: Tensor, gram: Gram | None, format: Format) -> dict[str, Tensor]:
    return format.write(weight.float(), least) if isinstance(format, IntGroups) else format.write(weight.float())


def _gptq(weight: Tensor, gram: Gram | None, format: Format) -> dict[str, Tensor]:
    near = _nearest(weight, gram, format)
    if gram is None or not isinstance(format, IntGroups):
        return near
    found = gptq(weight, gram, format)
    better_O1 = _is_better(found, near, weight, gram.matrix_II, format)[:, None]
    return {part: torch.where(better_O1, found.parts[part], near[part]) for part in near}


def _is_better(
    found: Rounded, near: Mapping[str, Tensor], weight_OI: Tensor, gram_II: Tensor, format: IntGroups
) -> Tensor:
    """Which rows lose less by GPTQ [O]. The other error is a product in float32; where that is too near to say, both are in float64."""
    columns, unit = weight_OI.shape[1], weight_OI.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny)
    lost_OI = (weight_OI.float() - format.read(near)[:, :columns]) / unit  # so that squares are numbers
    least_O = (lost_OI @ gram_II.to(lost_OI) * lost_OI).sum(1).double() * unit.double().square()
    clear_O = (found.error_O - least_O).abs() > DOUBT * torch.maximum(found.damped_O, least_O)
    better_O, o = found.error_O < least_O, (~clear_O).nonzero()[:, 0]
    if len(o):
        both = ({part: tensor[o] for part, tensor in parts.items()} for parts in (found.parts, near))
        error_O, least_O = (errors(weight_OI[o], format.read(x)[:, :columns], gram_II) for x in both)
        better_O[o] = error_O < least_O
    return better_O


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
