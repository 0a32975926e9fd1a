"""Statistics of the weights themselves: what a model's experts are, whatever the text. They are the same in all domains and files.

Letters: E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .definitions import statistic
from .events import WeightsEvent

PIECE = 2**20  # numbers of a matrix that are float64 at a time


def _of_weights(name: str, axes: str) -> Callable[[Callable], Callable]:
    return statistic(name, axes, WeightsEvent, on_demand=True, by_domain=False, merge="same")


def _sums(event: WeightsEvent, of_number: Callable[[Tensor], Tensor]) -> Tensor:
    """[E] the sum of a function of every number of an expert's matrices."""
    pieces = ((m.reshape(-1).split(PIECE) for m in matrices) for matrices in event.experts)
    sums = [sum(float(of_number(p.double()).sum()) for piece in each for p in piece) for each in pieces]
    return torch.tensor(sums, dtype=torch.float64)


@_of_weights("weight_mass", axes="E")
def weight_mass(event: WeightsEvent) -> Tensor:
    """The sum of the absolute values of an expert's weights.

    sum |w|, w all numbers of gate, up and down

    Needs:    weights; no text.
    Shapes:   (E,).
    Units:    weights.
    Edges:    biases are left out.
    Cost:     one pass over the weights.
    Source:   AIMER, arXiv 2603.18492.
    """
    return _sums(event, torch.abs)


@_of_weights("weight_square", axes="E")
def weight_square(event: WeightsEvent) -> Tensor:
    """The sum of the squares of an expert's weights.

    sum w^2, w all numbers of gate, up and down

    Needs:    weights; no text.
    Shapes:   (E,).
    Units:    weights squared.
    Edges:    biases are left out.
    Cost:     one pass over the weights.
    Source:   AIMER, arXiv 2603.18492; EWN of MC-Suite, arXiv 2504.05586.
    """
    return _sums(event, torch.square)


@_of_weights("weight_product", axes="EE")
def weight_product(event: WeightsEvent) -> Tensor:
    """The inner products of experts' weights, each expert as one long vector.

    vec(W_i) . vec(W_j), W gate, up and down one after the other

    Needs:    weights; no text.
    Shapes:   (E, E), symmetric, with `weight_square` on its diagonal.
    Units:    weights squared.
    Edges:    hidden units are compared in the order in which they lie; biases are left out.
    Cost:     one product of E*E and an expert's size; one layer's experts are in memory.
    Source:   EWS of MC-Suite, arXiv 2504.05586.
    """
    total_EE = torch.zeros(len(event.experts), len(event.experts), dtype=torch.float64)
    for same in zip(*event.experts, strict=True):  # the gates of all experts, their ups, their downs
        rows = max(1, PIECE // same[0].shape[1])
        for piece in zip(*(matrix.split(rows) for matrix in same), strict=True):
            numbers = torch.stack([part.reshape(-1) for part in piece]).double()
            total_EE += (numbers @ numbers.T).cpu()
    return total_EE


@_of_weights("stable_rank", axes="E")
def stable_rank(event: WeightsEvent) -> Tensor:
    """How many directions an expert's matrices spread over, the mean of its matrices.

    mean over gate, up, down of sum_i s_i^2 / s_1^2, s the singular values, the largest first

    Needs:    weights; no text.
    Shapes:   (E,).
    Units:    ranks: 1 to the smaller side of the matrices.
    Edges:    a matrix of zeros has 0.
    Cost:     the eigenvalues of three matrices of the smaller side for each expert.
    Source:   WSR of MC-Suite, arXiv 2504.05586. Differs: the paper does not say how an expert's matrices are put together.
    """
    found = [torch.stack([_stable_rank(matrix) for matrix in matrices]).mean() for matrices in event.experts]
    return torch.stack(found).cpu()


def _stable_rank(matrix: Tensor) -> Tensor:
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    gram = wide @ wide.T
    if not bool(gram.isfinite().all()):
        return gram.new_tensor(torch.nan)
    largest = torch.linalg.eigvalsh(gram)[-1]
    return torch.where(largest > 0, gram.trace() / torch.where(largest > 0, largest, 1.0), 0.0)


@_of_weights("down_column_square", axes="EF")
def down_column_square(event: WeightsEvent) -> Tensor:
    """The squared length of every column of an expert's last matrix.

    ||W_down[:, c]||_2^2

    Needs:    weights; no text.
    Shapes:   (E, F).
    Units:    weights squared.
    Edges:    none.
    Cost:     one pass over the last matrices.
    Source:   the energy of micro-experts of CAMERA, arXiv 2508.02322.
    """
    return torch.stack([matrices[-1].double().square().sum(dim=0) for matrices in event.experts]).cpu()


@_of_weights("router_product", axes="EE")
def router_product(event: WeightsEvent) -> Tensor:
    """The inner products of the router's rows, from which their distances are made.

    R_i . R_j, R_e the row of expert e in the router's matrix

    Needs:    weights; no text.
    Shapes:   (E, E), symmetric.
    Units:    router weights squared.
    Edges:    biases of the router are left out.
    Cost:     one product of E*E and the width of what the router reads.
    Source:   STUN, arXiv 2409.06211.
    """
    rows_EI = event.router_EI.double()
    return (rows_EI @ rows_EI.T).cpu()


@_of_weights("router_norm", axes="E")
def router_norm(event: WeightsEvent) -> Tensor:
    """The length of the router's row for an expert.

    ||r_e||_2, r_e the weights that make the logit of e

    Needs:    the router's weights; no text.
    Shapes:   (E,).
    Units:    weights.
    Edges:    selection biases are left out.
    Cost:     none.
    Source:   RWN of MC-Suite, arXiv 2504.05586.
    """
    return torch.linalg.vector_norm(event.router_EI.double(), dim=1).cpu()
