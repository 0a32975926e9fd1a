"""Matrices as products of a factor of their own and a mixture of a few shared bases (MoBE, arXiv 2508.05257).

    W_e = A_e C_e,   C_e = sum_j mix_e,j B_j

Fitted by least squares for one of A, B and mix after the other (Frobenius norm, no inputs), in float64.

Letters: E experts, O outputs and I inputs of a matrix, R rank, M bases.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 30  # of all three
TINY = 1e-12  # of a system's mean diagonal: what is added where it may be singular
STILL = 1e-6  # a step that lowers the error by a smaller share of it is the last


class Mixture(NamedTuple):
    own_EOR: Tensor  # A
    mix_EM: Tensor
    bases_MRI: Tensor  # B, each of norm 1


def fit_mixture(weight_EOI: Tensor, rank: int, bases: int) -> Mixture:
    """The mixture nearest to these matrices, from a start that is exact where each has the directions of one of the bases.

    The start: each expert joins one of those whose leading right singular vectors are least alike, and the bases are the leading
    ones of all that joined. Experts that share directions in other ways are approached step by step, and slowly. Bases beyond the number of experts are
    zero. Deterministic. Raises torch.linalg.LinAlgError for numbers that are not finite.
    """
    weight_EOI = weight_EOI.double()
    more = max(0, bases - len(weight_EOI))
    mix_EM, bases_MRI = _start(weight_EOI, rank, bases - more)
    size, error = float(weight_EOI.square().sum()), float("inf")
    own_EOR = _own(weight_EOI, mix_EM, bases_MRI)
    for _ in range(STEPS):
        bases_MRI = _bases(weight_EOI, own_EOR, mix_EM)
        mix_EM = _mix(weight_EOI, own_EOR, bases_MRI)
        own_EOR = _own(weight_EOI, mix_EM, bases_MRI)
        before, error = error, float((weight_EOI - own_EOR @ mixed(mix_EM, bases_MRI)).square().sum())
        if before - error <= STILL * error or error <= TINY * size:
            break
    mix_EM = torch.cat([mix_EM, mix_EM.new_zeros(len(mix_EM), more)], dim=1)
    return Mixture(own_EOR, mix_EM, torch.cat([bases_MRI, bases_MRI.new_zeros(more, *bases_MRI.shape[1:])]))


def mixed(mix_EM: Tensor, bases_MRI: Tensor) -> Tensor:
    """[E, R, I] the mixture of bases of each expert."""
    return torch.einsum("em,mri->eri", mix_EM, bases_MRI)


def _start(weight_EOI: Tensor, rank: int, bases: int) -> tuple[Tensor, Tensor]:
    right_ERI = torch.linalg.svd(weight_EOI, full_matrices=False).Vh[:, :rank]
    alike_EE = torch.stack([(right_ERI @ right_RI.T).square().sum(dim=(1, 2)) for right_RI in right_ERI])
    chosen = [0]
    while len(chosen) < bases:
        nearest_E = alike_EE[:, chosen].amax(dim=1)
        nearest_E[chosen] = torch.inf
        chosen.append(int(nearest_E.argmin()))
    mix_EM = torch.nn.functional.one_hot(alike_EE[:, chosen].argmax(dim=1), bases).to(weight_EOI)
    gram_MII = torch.stack([(weight_EOI[j_E].mT @ weight_EOI[j_E]).sum(dim=0) for j_E in mix_EM.bool().mT])
    return mix_EM, _unit(torch.linalg.eigh(gram_MII).eigenvectors[:, :, -rank:].mT)


def _unit(bases_MRI: Tensor) -> Tensor:
    norm_M = torch.linalg.vector_norm(bases_MRI, dim=(1, 2), keepdim=True)
    return bases_MRI / torch.where(norm_M > 0, norm_M, 1.0)


def _solve(square: Tensor, right: Tensor) -> Tensor:
    """X with square X = right, for symmetric matrices, nearly singular ones too."""
    mean = square.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    added = torch.where(mean > 0, TINY * mean, 1.0)[..., None, None] * torch.eye(square.shape[-1]).to(square)
    return torch.linalg.solve(square + added, right)


def _own(weight_EOI: Tensor, mix_EM: Tensor, bases_MRI: Tensor) -> Tensor:
    mixed_ERI = mixed(mix_EM, bases_MRI)
    return _solve(mixed_ERI @ mixed_ERI.mT, mixed_ERI @ weight_EOI.mT).mT


def _bases(weight_EOI: Tensor, own_EOR: Tensor, mix_EM: Tensor) -> Tensor:
    (_, _, rank), (_, count) = own_EOR.shape, mix_EM.shape
    square_RR = torch.einsum("em,en,ers->mrns", mix_EM, mix_EM, own_EOR.mT @ own_EOR).reshape(count * rank, -1)
    wanted_RI = torch.einsum("em,eri->mri", mix_EM, own_EOR.mT @ weight_EOI).reshape(count * rank, -1)
    return _unit(_solve(square_RR, wanted_RI).view(count, rank, -1))


def _mix(weight_EOI: Tensor, own_EOR: Tensor, bases_MRI: Tensor) -> Tensor:
    square_ERR, wanted_ERI = own_EOR.mT @ own_EOR, own_EOR.mT @ weight_EOI
    between_MNRR = torch.einsum("mri,nsi->mnrs", bases_MRI, bases_MRI)
    square_EMM = torch.einsum("mnrs,ers->emn", between_MNRR, square_ERR)
    wanted_EM = torch.einsum("mri,eri->em", bases_MRI, wanted_ERI)
    return _solve(square_EMM, wanted_EM[..., None])[..., 0]
