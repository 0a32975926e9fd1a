"""Low-rank factors B A of a matrix: drawn at random, from an SVD, or from an SVD whitened by the inputs.

Letters: R rank, I inputs, O outputs, M the smaller of the two.
"""

from __future__ import annotations

import functools

import scipy.linalg
import torch
from torch import Tensor

STEPS = 4  # of block Krylov iteration
SPARE = 8  # columns beside the rank in its blocks


def gaussian_factors(
    rows: int, columns: int, rank: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [R, columns] drawn from N(0, 1/columns), B [rows, R] zero: the product starts at nothing (as LoRA)."""
    a = torch.randn(rank, columns, generator=generator) / columns**0.5
    return a.to(like), like.new_zeros(rows, rank)


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors A [R, columns], B [rows, R] of a matrix; singular values shared evenly by both.

    With U the leading eigenvectors of the smaller of W W^T and W^T W, the product is U U^T W or W U U^T. In float64, or in steps
    (`_in_steps`) where the rank is small beside the matrix.
    """
    if _few(rank, matrix):
        return _on(_in_steps(matrix, None, rank), matrix)
    w_OI = matrix.double()
    tall = len(w_OI) > w_OI.shape[1]
    small_MN = w_OI.T if tall else w_OI
    a_RI, b_OR = _on(_leading(small_MN @ small_MN.T, rank), small_MN)
    if tall:
        a_RI, b_OR = b_OR.T, a_RI.T
    return a_RI.to(matrix.dtype), b_OR.to(matrix.dtype)


def refitted(b_OR: Tensor, a_RI: Tensor, new_RI: Tensor, seen_RI: Tensor | None) -> Tensor:
    """The factor B' for which B' A' comes nearest to B A, where A became A': B A G A'^T (A' G A'^T)^-1, in float64.

    `seen_RI` is A' G, G the Gram matrix of the inputs; without one, all inputs are alike. Rows of A' that are zero get nothing.
    """
    b_OR, a_RI, new_RI = b_OR.double(), a_RI.double(), new_RI.double()
    seen_RI = new_RI if seen_RI is None else seen_RI.to(new_RI)
    square_RR = seen_RI @ new_RI.T
    scale = float(square_RR.diagonal().mean())
    if not scale > 0:
        return b_OR
    damped_RR = square_RR + torch.eye(len(square_RR)).to(square_RR) * (1e-9 * scale)
    return torch.linalg.solve(damped_RR, seen_RI @ a_RI.T @ b_OR.T).T


def whitened_factors(matrix: Tensor, gram_II: Tensor, rank: int, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The factors of one rank of `Whitened`."""
    return Whitened(matrix, gram_II, ridge).factors(rank)


class Whitened:
    """The factors A [R, I], B [O, R] of every rank that lose least of what a matrix [O, I] says about its inputs.

    They minimise ||(W - B A) S||_F, S S^T = G + r I, with G = sum x x^T over the inputs: SVD-LLM, arXiv 2403.07378,
    which truncates W S = U Sigma V^T and takes B A = U_R Sigma_R V_R^T S^-1. That product is U_R U_R^T W, and U are the
    eigenvectors of W S S^T W^T, so neither S nor its inverse is needed, and a singular G (fewer tokens than inputs)
    does no harm: r, the share `ridge` of G's mean diagonal, decides directions that no token saw. G = 0 (no token
    at all) gives the plain SVD. Both factors of a direction get the same norm. In float64, or in steps (`_in_steps`) where the rank
    is small beside the matrix. All eigenvectors are found at once, so that any rank has the same as all others.
    """

    def __init__(self, matrix: Tensor, gram_II: Tensor, ridge: float = 1e-6) -> None:
        self._matrix, self._gram_II, self._ridge = matrix, gram_II, ridge

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A and B in the matrix's dtype. Raises torch.linalg.LinAlgError."""
        matrix = self._matrix
        if _few(rank, matrix):
            return _on(_in_steps(matrix, self._gram_II, rank, self._ridge), matrix)
        q_OM, rest_MI, u_MM = self._directions
        a_RI, b_MR = _on(u_MM[:, :rank], rest_MI)
        b_OR = b_MR if q_OM is None else q_OM @ b_MR
        return a_RI.to(matrix.dtype), b_OR.to(matrix.dtype)

    @functools.cached_property
    def _directions(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Q and R of a matrix that is taller than wide, or none and the matrix, and the eigenvectors, largest first."""
        q_OM, rest_MI = None, self._matrix.double()
        if len(rest_MI) > rest_MI.shape[1]:
            q_OM, rest_MI = torch.linalg.qr(rest_MI)  # so that eigenvectors are of the smaller side, M = min(O, I)
        gram_II = self._gram_II.to(rest_MI)
        ridge_II = torch.eye(len(gram_II)).to(gram_II) * _ridge(gram_II, self._ridge)
        spread_MM = rest_MI @ (gram_II + ridge_II) @ rest_MI.T
        return q_OM, rest_MI, torch.linalg.eigh(spread_MM).eigenvectors.flip(1)


def _ridge(gram_II: Tensor, share: float) -> float:
    scale = float(gram_II.diagonal().mean())
    return share * scale if scale > 0 else 1.0


def _on(u_MR: Tensor, matrix_MI: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix on directions U, as A = U^T W and B = U with equal norms, in the matrix's dtype."""
    a_RI = u_MR.T @ matrix_MI.to(u_MR.dtype)
    root_R = torch.linalg.vector_norm(a_RI, dim=1).sqrt()
    a_RI, b_MR = a_RI / torch.where(root_R > 0, root_R, 1.0)[:, None], u_MR * root_R
    return a_RI.to(matrix_MI.dtype), b_MR.to(matrix_MI.dtype)


def _few(rank: int, matrix: Tensor) -> bool:
    """Whether steps cost less than all products of the smaller side: where their directions are at most a quarter of it."""
    return 4 * (STEPS + 1) * (rank + SPARE) <= min(matrix.shape)


def _in_steps(matrix_MI: Tensor, gram_II: Tensor | None, rank: int, ridge: float = 0.0) -> Tensor:
    """Leading eigenvectors [M, R] of S = W G W^T, or of W W^T without G, largest first, by block Krylov iteration.

    From the span of X, S X, ..., S^4 X, with X of R + 8 columns drawn from a fixed seed: Musco and Musco, arXiv 1504.05477. In float32,
    since S X needs few operations and no S. ||W - U U^T W||^2 is at most 1.002 times its least value where all singular values are
    alike, 1.00002 times where they fall as i^-1/4, and its least value to float32's precision where they fall as i^-1/2.
    Raises torch.linalg.LinAlgError.
    """
    largest = matrix_MI.abs().max().float()
    matrix_MI = matrix_MI.float() / torch.where(largest > 0, largest, 1.0)
    if gram_II is not None:
        ridge = _ridge(gram_II, ridge)
        unit = max(float(gram_II.diagonal().mean()), ridge)
        gram_II, ridge = (gram_II / unit).to(matrix_MI), ridge / unit

    def weighed(block_IC: Tensor) -> Tensor:  # G W^T X of W^T X
        return block_IC if gram_II is None else (gram_II @ block_IC).add_(block_IC, alpha=ridge)

    start = torch.randn(len(matrix_MI), rank + SPARE, generator=torch.Generator().manual_seed(0))
    blocks, turned = [torch.linalg.qr(start.to(matrix_MI.device)).Q], []  # X and W^T X
    for _ in range(STEPS):
        turned.append((blocks[-1].T @ matrix_MI).T)  # faster than matrix_MI.T @ blocks[-1]
        before_MC, block_MC = torch.cat(blocks, dim=1), matrix_MI @ weighed(turned[-1])
        blocks.append(torch.linalg.qr(block_MC - before_MC @ (before_MC.T @ block_MC)).Q)
    basis_MC, turned_IC = torch.cat(blocks, dim=1), torch.cat([*turned, matrix_MI.T @ blocks[-1]], dim=1)
    if not _orthonormal(basis_MC):  # blocks of a matrix of low rank; Householder's QR makes any columns so
        basis_MC = torch.linalg.qr(basis_MC).Q
        turned_IC = matrix_MI.T @ basis_MC
    within_CC = (turned_IC.T @ weighed(turned_IC)).double()
    if not within_CC.isfinite().all():
        raise torch.linalg.LinAlgError("numbers that are not finite have no leading directions")
    return basis_MC @ torch.linalg.eigh(within_CC).eigenvectors[:, -rank:].flip(1).to(basis_MC)


def _orthonormal(basis_MC: Tensor) -> bool:
    return bool((basis_MC.T @ basis_MC - torch.eye(basis_MC.shape[1]).to(basis_MC)).abs().max() < 1e-4)


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
