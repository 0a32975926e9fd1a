"""Low-rank factors B A of a matrix: drawn at random, from an SVD, or from an SVD whitened by the inputs.

Letters: R rank, I inputs, O outputs, M the smaller of the two.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor


def gaussian_factors(
    rows: int, columns: int, rank: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [R, columns] drawn from N(0, 1/columns), B [rows, R] zero: the product starts at nothing (as LoRA)."""
    a = torch.randn(rank, columns, generator=generator) / columns**0.5
    return a.to(like), like.new_zeros(rows, rank)


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors A [R, columns], B [rows, R] of a matrix; singular values shared evenly by both.

    With U the leading eigenvectors of the smaller of W W^T and W^T W, the product is U U^T W or W U U^T. All of it in float64.
    """
    w_OI = matrix.double()
    tall = len(w_OI) > w_OI.shape[1]
    a_RI, b_OR = _on_leading(w_OI.T @ w_OI if tall else w_OI @ w_OI.T, w_OI.T if tall else w_OI, rank)
    if tall:
        a_RI, b_OR = b_OR.T, a_RI.T
    return a_RI.to(matrix.dtype), b_OR.to(matrix.dtype)


def refitted(b_OR: Tensor, a_RI: Tensor, new_RI: Tensor, gram_II: Tensor | None) -> Tensor:
    """The factor B' for which B' A' comes nearest to B A, where A became A': B A G A'^T (A' G A'^T)^-1, in float64.

    G is the Gram matrix of the inputs; without one, all inputs are alike. Rows of A' that are zero get nothing.
    """
    b_OR, a_RI, new_RI = b_OR.double(), a_RI.double(), new_RI.double()
    seen_RI = new_RI if gram_II is None else new_RI @ gram_II.to(new_RI)
    square_RR = seen_RI @ new_RI.T
    scale = float(square_RR.diagonal().mean())
    if not scale > 0:
        return b_OR
    damped_RR = square_RR + torch.eye(len(square_RR)).to(square_RR) * (1e-9 * scale)
    return torch.linalg.solve(damped_RR, seen_RI @ a_RI.T @ b_OR.T).T


def whitened_factors(matrix: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-`rank` factors A [R, I], B [O, R] that lose least of what a matrix [O, I] says about its inputs.

    They minimise ||(W - B A) S||_F, S S^T = G + jitter I, with G = sum x x^T over the inputs: SVD-LLM, arXiv 2403.07378,
    which truncates W S = U Sigma V^T and takes B A = U_R Sigma_R V_R^T S^-1. That product is U_R U_R^T W, and U are the
    eigenvectors of W S S^T W^T, so neither S nor its inverse is needed, and a singular G (fewer tokens than inputs)
    does no harm: the jitter, a millionth of G's mean diagonal, decides directions that no token saw. G = 0 (no token
    at all) gives the plain SVD. Both factors of a direction get the same norm. All of it in float64.
    """
    q_OM, rest_MI = None, matrix.double()
    if len(rest_MI) > rest_MI.shape[1]:
        q_OM, rest_MI = torch.linalg.qr(rest_MI)  # so that eigenvectors are of the smaller side, M = min(O, I)
    gram_II = gram_II.to(rest_MI)
    scale = float(gram_II.diagonal().mean())
    jitter_II = torch.eye(len(gram_II)).to(gram_II) * (1e-6 * scale if scale > 0 else 1.0)
    spread_MM = rest_MI @ (gram_II + jitter_II) @ rest_MI.T
    a_RI, b_MR = _on_leading(spread_MM, rest_MI, rank)
    b_OR = b_MR if q_OM is None else q_OM @ b_MR
    return a_RI.to(matrix.dtype), b_OR.to(matrix.dtype)


def _on_leading(spread_MM: Tensor, matrix_MI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A matrix on the `rank` leading eigenvectors U of a symmetric one, as A = U^T W and B = U with equal norms."""
    u_MR = _leading(spread_MM, rank)
    a_RI = u_MR.T @ matrix_MI
    root_R = torch.linalg.vector_norm(a_RI, dim=1).sqrt()
    return a_RI / torch.where(root_R > 0, root_R, 1.0)[:, None], u_MR * root_R


def _leading(spread_MM: Tensor, rank: int) -> Tensor:
    """Eigenvectors [M, R] of the largest eigenvalues, largest first. Raises torch.linalg.LinAlgError."""
    if spread_MM.device.type != "cpu" or 2 * rank > len(spread_MM):
        return torch.linalg.eigh(spread_MM).eigenvectors[:, -rank:].flip(1)
    # LAPACK's syevr finds a few of them in a third of the time; torch has only the solver for all.
    size = len(spread_MM)
    try:
        _, vectors = scipy.linalg.eigh(spread_MM.numpy(), subset_by_index=(size - rank, size - 1), driver="evr")
    except (scipy.linalg.LinAlgError, ValueError) as error:  # ValueError: numbers that are not finite
        raise torch.linalg.LinAlgError(str(error)) from error
    return torch.from_numpy(vectors).flip(1)
