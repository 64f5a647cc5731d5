"""Second-order rounding on a Gram matrix, for any format: GPTQ and the coordinate descent that follows it.

Minimises tr((W - Q) H (W - Q)^T) over the codes of Q, where H = X^T X (+ damping) is (in, in), W is (out, in).
GPTQ: Frantar et al. 2022, section 3 (the blocked form, with the inverse Cholesky factor).
Coordinate descent: one column of codes at a time is set to its best value with all others fixed, so the
objective never rises (the update is exact because the rows are independent and the grid is fixed).
"""

from __future__ import annotations

from collections.abc import Callable
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
    width = coded_together(fmt, params)
    order = _visiting_order(hessian.diagonal(), width)
    factor = inverse_factor(hessian[order][:, order], where)
    remaining = weight[:, order].to(factor.dtype)
    codes = torch.empty(shape, dtype=torch.int32, device=weight.device)
    size = BLOCK // width * width or width
    for start in range(0, shape[1], size):
        stop = min(start + size, shape[1])
        block, errors = remaining[:, start:stop], torch.empty_like(remaining[:, start:stop])
        corner = factor[start:stop, start:stop]
        values = torch.empty_like(block)
        for j in range(stop - start):
            if j % width == 0:  # a vector is coded whole; its columns' errors are then spread one by one
                column = int(order[start + j])
                where_column = slice(column, min(column + width, shape[1]))
                span = slice(j, j + where_column.stop - where_column.start)
                codes[:, where_column] = fmt.code(block[:, span].float(), grid, params, shape, where_column)
                values[:, span] = fmt.value(codes[:, where_column], grid, params, shape, where_column).to(values)
            errors[:, j] = (block[:, j] - values[:, j]) / corner[j, j]
            block[:, j:] -= torch.outer(errors[:, j], corner[j, j:])
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def coded_together(fmt: ModuleType, params: Any) -> int:
    """Columns that one code covers."""
    return fmt.width(params) if hasattr(fmt, "width") else 1


def _visiting_order(diagonal: Tensor, width: int) -> Tensor:
    """Columns by falling diagonal of the Hessian; vectors stay whole, and one that is shorter comes last."""
    if width == 1:
        return torch.argsort(diagonal, descending=True, stable=True)
    whole = len(diagonal) // width * width
    energy = diagonal[:whole].reshape(-1, width).sum(1)
    first = torch.argsort(energy, descending=True, stable=True) * width
    order = (first[:, None] + torch.arange(width, device=diagonal.device)).flatten()
    return torch.cat([order, torch.arange(whole, len(diagonal), device=diagonal.device)])


def descend(
    weight: Tensor, codes: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any, sweeps: int
) -> Tensor:
    """`sweeps` passes of cyclic coordinate descent over the columns (vectors); the objective never rises.

    Inside a block of columns only the block's own gradient is kept up to date; the rest follows in one product.
    """
    shape = (weight.shape[0], weight.shape[1])
    width = coded_together(fmt, params)
    size = max(BLOCK // width * width, width)
    codes = codes.clone()
    weight = weight.to(hessian.dtype)
    error = weight - fmt.value(codes, grid, params, shape)
    if not sweeps:
        return codes
    gradient = error @ hessian
    step = (_column if width == 1 else _vector)(weight, hessian, grid, fmt, params)
    for _ in range(sweeps):
        changed = False
        for start in range(0, shape[1], size):
            block = slice(start, min(start + size, shape[1]))
            before = error[:, block].clone()
            if _descend_block(step, weight, codes, error, gradient, hessian, block, width):
                gradient += (error[:, block] - before) @ hessian[block]
                changed = True
        if not changed:
            break
    return codes


# column or vector, its error and its part of error @ hessian -> its best codes with all others fixed, and their values
Step = Callable[[slice, Tensor, Tensor], tuple[Tensor, Callable[[], Tensor]]]


def _column(weight: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any) -> Step:
    shape = (weight.shape[0], weight.shape[1])

    def step(column: slice, error: Tensor, gradient: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        target = weight[:, column] - error + gradient / hessian[column, column]
        codes = fmt.code(target.float(), grid, params, shape, column)
        return codes, lambda: fmt.value(codes, grid, params, shape, column).to(error.dtype)

    return step


def _vector(weight: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any) -> Step:
    width, count = fmt.width(params), len(hessian)
    metrics = {k: hessian[k : k + width, k : k + width].double() for k in range(0, count, width)}
    nearest = fmt.Nearest(grid, params, metrics)
    inverses = {k: torch.linalg.inv(metric) for k, metric in metrics.items()}

    def step(column: slice, error: Tensor, gradient: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        target = weight[:, column] - error + gradient @ inverses[column.start].to(gradient)
        index, values = nearest(column.start, target.double())
        return index[:, None].to(torch.int32), lambda: values.to(error.dtype)

    return step


def _descend_block(
    step: Step, weight: Tensor, codes: Tensor, error: Tensor, gradient: Tensor, hessian: Tensor, block: slice,
    width: int,
) -> bool:  # fmt: skip
    """One pass over the columns of a block; changes `codes` and `error` there, and says whether any code moved."""
    changed = False
    local, corner = gradient[:, block].clone(), hessian[block, block]
    for k in range(block.start, block.stop, width):
        column = slice(k, min(k + width, block.stop))
        inner = slice(k - block.start, column.stop - block.start)
        own = error[:, column]
        chosen, values = step(column, own, local[:, inner])
        if torch.equal(chosen, codes[:, column.start : column.start + chosen.shape[1]]):
            continue
        changed = True
        codes[:, column] = chosen
        new_error = weight[:, column] - values()
        local += (new_error - own) @ corner[inner]
        error[:, column] = new_error
    return changed


def alternate(
    weight: Tensor, codes: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any, rounds: int, sweeps: int
) -> tuple[Tensor, Any]:
    """`rounds` of refitting scales or codebooks to the codes and descending on the codes; a round that does not lower
    the objective is undone and ends it."""
    shape = (weight.shape[0], weight.shape[1])
    least = objective(weight, fmt.value(codes, grid, params, shape), hessian).sum()
    for _ in range(rounds if hasattr(fmt, "refit") else 0):
        new_grid = fmt.refit(weight, codes, grid, params, hessian)
        if new_grid is None:
            break
        new_codes = descend(weight, codes, hessian, new_grid, fmt, params, sweeps)
        found = objective(weight, fmt.value(new_codes, new_grid, params, shape), hessian).sum()
        if not found < least:
            break
        codes, grid, least = new_codes, new_grid, found
    return codes, grid


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) per output row, shape (out,)."""
    error = (weight - quantized).to(hessian.dtype)
    return ((error @ hessian) * error).sum(1)
