"""Second-order rounding on a Gram matrix, for any format: GPTQ and the coordinate descent that follows it.

Minimises tr((W - Q) H (W - Q)^T) over the codes of Q, where H = X^T X (+ damping) is (in, in), W is (out, in).
GPTQ: Frantar et al. 2022, section 3 (the blocked form, with the inverse Cholesky factor).
Coordinate descent: one column of codes at a time is set to its best value with all others fixed, so the
objective never rises (the update is exact because the rows are independent and the grid is fixed).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError

BLOCK = 64  # columns updated together: the update outside the block is one matrix product


def damped(gram: Tensor, damp: float, where: str) -> Tensor:
    """Gram + damp * mean diagonal on the diagonal; a dead channel (zero diagonal) gets 1 there.

    Raises E701 when the matrix has no finite positive diagonal.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(gram).all() or mean <= 0:
        raise DitcompressError("E701", where, "its Gram matrix is not finite or all zero", "calibrate again")
    hessian = gram / mean
    ridge = torch.where(diagonal > 0, torch.full_like(diagonal, damp), torch.ones_like(diagonal))
    return hessian + torch.diag(ridge)


def inverse_factor(hessian: Tensor, where: str) -> Tensor:
    """Upper Cholesky factor of the inverse; damping is raised tenfold, up to three times, when it does not exist."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for ridge in (0.0, 1e-4, 1e-3, 1e-2):
        lower, failed = torch.linalg.cholesky_ex(hessian + ridge * eye)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
    raise DitcompressError(
        "E701", where, "its Gram matrix is singular", "raise gptq.damp or calibrate with more samples"
    )


def gptq(weight: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any, where: str = "") -> Tensor:
    """Codes (out, in), int32. The columns are visited from the largest to the smallest diagonal of the Hessian
    (the order GPTQ calls act-order), which the grid allows because its scales are fixed beforehand."""
    shape = (weight.shape[0], weight.shape[1])
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], where)
    remaining = weight[:, order].to(factor.dtype)
    codes = torch.empty(shape, dtype=torch.int32, device=weight.device)
    for start in range(0, shape[1], BLOCK):
        stop = min(start + BLOCK, shape[1])
        block, errors = remaining[:, start:stop], torch.empty_like(remaining[:, start:stop])
        corner = factor[start:stop, start:stop]
        for j in range(stop - start):
            column = int(order[start + j])
            where_column = slice(column, column + 1)
            chosen = fmt.code(block[:, j : j + 1].float(), grid, params, shape, where_column)
            codes[:, where_column] = chosen
            value = fmt.value(chosen, grid, params, shape, where_column)[:, 0]
            errors[:, j] = (block[:, j] - value) / corner[j, j]
            block[:, j:] -= torch.outer(errors[:, j], corner[j, j:])
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def descend(
    weight: Tensor, codes: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any, sweeps: int
) -> Tensor:
    """`sweeps` passes of cyclic coordinate descent over the columns; the objective never rises."""
    shape = (weight.shape[0], weight.shape[1])
    codes = codes.clone()
    error = weight.to(hessian.dtype) - fmt.value(codes, grid, params, shape)
    for _ in range(sweeps):
        gradient = error @ hessian
        changed = False
        for k in range(shape[1]):
            column = slice(k, k + 1)
            current = weight[:, k] - error[:, k]
            best = (current + gradient[:, k] / hessian[k, k]).float().unsqueeze(1)
            chosen = fmt.code(best, grid, params, shape, column)
            moved = (chosen != codes[:, column])[:, 0]
            if not moved.any():
                continue
            changed = True
            codes[:, column] = chosen
            new_error = weight[:, k] - fmt.value(chosen, grid, params, shape, column)[:, 0]
            gradient += torch.outer(new_error - error[:, k], hessian[k])
            error[:, k] = new_error
        if not changed:
            break
    return codes


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) per output row, shape (out,)."""
    error = (weight - quantized).to(hessian.dtype)
    return ((error @ hessian) * error).sum(1)
