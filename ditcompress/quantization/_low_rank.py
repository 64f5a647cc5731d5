"""Low-rank factors by randomized SVD (Halko et al. 2011), plain or weighted by the Gram matrix of the input.

The weighted form minimises tr((E - UV) H (E - UV)^T) with H = L L^T: it is the SVD of E L, mapped back by L^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 10, 4  # performance notes: 50x over a full SVD, error nearly unchanged


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V^T (r, in) of the r largest singular values; exact where the matrix is small."""
    least = min(matrix.shape)
    if rank + OVERSAMPLING >= least or least <= 64:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    test = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ test.to(matrix.device)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def low_rank(
    error: Tensor, rank: int, generator: torch.Generator, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """bfloat16 factors up (out, r) and down (r, in) of `error` (out, in); `hessian` (in, in) weights its columns."""
    if hessian is None:
        left, values, right = truncated_svd(error, rank, generator)
    else:
        root = torch.linalg.cholesky(hessian)
        left, values, right = truncated_svd(error.to(hessian.dtype) @ root, rank, generator)
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    up = left * values
    balance = (right.norm(dim=1) / up.norm(dim=0).clamp_min(1e-30)).clamp(1e-15, 1e15).sqrt()  # factors of like size
    return (up * balance).to(torch.bfloat16), (right / balance[:, None]).to(torch.bfloat16)
