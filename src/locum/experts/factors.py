"""Low-rank factors B A of a matrix: drawn at random, from an SVD, or from an SVD whitened by the inputs.

Letters: R rank, I inputs, O outputs, M the smaller of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_factors(
    rows: int, columns: int, rank: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [R, columns] drawn from N(0, 1/columns), B [rows, R] zero: the product starts at nothing (as LoRA)."""
    a = torch.randn(rank, columns, generator=generator) / columns**0.5
    return a.to(like), like.new_zeros(rows, rank)


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors A [R, columns], B [rows, R] of a matrix; singular values shared evenly by both."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).to(matrix.dtype), (u[:, :rank] * root).to(matrix.dtype)


def whitened_factors(matrix: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-`rank` factors A [R, I], B [O, R] that lose least of what a matrix [O, I] says about its inputs.

    They minimise ||(W - B A) S||_F, S S^T = G + jitter I, with G = sum x x^T over the inputs: SVD-LLM, arXiv 2403.07378,
    which truncates W S = U Sigma V^T and takes B A = U_R Sigma_R V_R^T S^-1. That product is U_R U_R^T W, and U are the
    eigenvectors of W S S^T W^T, so neither S nor its inverse is needed, and a singular G (fewer tokens than inputs)
    does no harm: the jitter, a millionth of G's mean diagonal, decides directions that no token saw. G = 0 (no token
    at all) gives the plain SVD. Both factors of a direction get the same norm. All of it in float64.
    """
    q_OM, rest_MI = torch.linalg.qr(matrix.double())  # so that eigenvectors are of the smaller side, M = min(O, I)
    gram_II = gram_II.to(rest_MI)
    scale = float(gram_II.diagonal().mean())
    jitter_II = torch.eye(len(gram_II)).to(gram_II) * (1e-6 * scale if scale > 0 else 1.0)
    spread_MM = rest_MI @ (gram_II + jitter_II) @ rest_MI.T
    u_MR = torch.linalg.eigh(spread_MM).eigenvectors.flip(1)[:, :rank]
    a_RI = u_MR.T @ rest_MI
    root_R = torch.linalg.vector_norm(a_RI, dim=1).sqrt()
    a_RI = a_RI / torch.where(root_R > 0, root_R, 1.0)[:, None]
    return a_RI.to(matrix.dtype), (q_OM @ u_MR * root_R).to(matrix.dtype)
