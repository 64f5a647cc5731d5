"""Second-order rounding on a Gram matrix, for any format: GPTQ and the coordinate descent that follows it.

Minimises tr((W - Q) H (W - Q)^T) over the codes of Q, where H = X^T X (+ damping) is (in, in), W is (out, in).
B weights of equal shape are solved together where each column costs more calls than arithmetic: W is (B * out, in), one
weight under the other with a grid made by `stacked`, and H (B, in, in). Work tensors are (B, in, out), so that a column
of each weight is contiguous. Each weight gets the codes that it would get alone, up to rounding of sums.
GPTQ: Frantar et al. 2022, section 3 (the blocked form, with the inverse Cholesky factor).
Coordinate descent: one column of codes at a time is set to its best value with all others fixed, so the
objective never rises (the update is exact because the rows are independent and the grid is fixed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import stack_rows

HALVED = 256  # order of a triangular matrix that is inverted directly
BLOCK = 64  # columns updated together: the update outside the block is one matrix product


def damped(gram: Tensor, damp: float, where: str) -> Tensor:
    """Gram + damp * mean diagonal on the diagonal; a dead channel (zero diagonal) gets 1 there, so that a matrix of
    zeros rounds every weight to nearest.

    Raises E701 when the matrix has no finite diagonal without negative values.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(gram).all() or mean < 0:
        raise DitcompressError("E701", where, "its Gram matrix is not finite", "calibrate again")
    hessian = gram / mean if mean > 0 else gram
    ridge = torch.where(diagonal > 0, torch.full_like(diagonal, damp), torch.ones_like(diagonal))
    return hessian + torch.diag(ridge)


def inverse_factor(hessian: Tensor, where: str) -> Tensor:
    """Upper Cholesky factor of the inverse; damping is raised tenfold, up to three times, when it does not exist."""
    turned = hessian.flip(0, 1)  # turned = L L^T gives H^-1 = R^T R with R = flip(L^-1): one factorization, not two
    for ridge in (0.0, 1e-4, 1e-3, 1e-2):
        if ridge:
            turned = turned + ridge * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            factor = triangular_inverse(lower).flip(0, 1)
            if torch.isfinite(factor).all():
                return factor
    raise DitcompressError(
        "E701", where, "its Gram matrix is singular", "raise gptq.damp or calibrate with more samples"
    )


def triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix (n, n), by halves: almost all of it is matrix products."""
    count = len(lower)
    if count <= HALVED:
        eye = torch.eye(count, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = count // 2
    found = torch.zeros_like(lower)
    found[:half, :half] = triangular_inverse(lower[:half, :half])
    found[half:, half:] = triangular_inverse(lower[half:, half:])
    found[half:, :half] = -(found[half:, half:] @ lower[half:, :half]) @ found[:half, :half]
    return found


def gptq(weight: Tensor, hessian: Tensor, grid: Any, fmt: ModuleType, params: Any, names: Sequence[str] = ()) -> Tensor:
    """Codes (B * out, in), int32. The columns are visited from the largest to the smallest diagonal of the Hessian
    (the order GPTQ calls act-order), which the grid allows because its scales are fixed beforehand. `hessian` is
    (in, in) or (B, in, in); `names` of the B weights."""
    shape = (weight.shape[0], weight.shape[1])
    hessian = hessian.reshape(-1, shape[1], shape[1])
    count, width = len(hessian), coded_together(fmt, params)
    order = torch.stack([_visiting_order(one.diagonal(), width) for one in hessian])
    each = torch.arange(count, device=order.device)[:, None]
    factor = torch.stack([
        inverse_factor(one[place][:, place], name)
        for one, place, name in zip(hessian, order, names or [""] * count, strict=True)
    ])  # fmt: skip
    remaining = _columns_first(weight, count)[each, order].to(factor.dtype)
    codes = torch.empty(remaining.shape, dtype=torch.int32, device=weight.device)
    size = BLOCK // width * width or width
    for start in range(0, shape[1], size):
        stop = min(start + size, shape[1])
        block, errors = remaining[:, start:stop], torch.empty_like(remaining[:, start:stop])
        corner = factor[:, start:stop, start:stop]
        for j in range(0, stop - start, width):  # a vector is coded whole, its columns' errors one by one
            span = slice(j, min(j + width, stop - start))
            where = order[:, None, start + span.start : start + span.stop].expand(-1, shape[0] // count, -1)
            where = where.reshape(shape[0], -1)
            chosen = fmt.code(_rows_first(block[:, span]).float(), grid, params, shape, where)
            values = _columns_first(fmt.value(chosen, grid, params, shape, where), count)
            codes[:, start + span.start : start + span.stop] = _columns_first(chosen, count)
            for i in range(span.start, span.stop):
                errors[:, i] = (block[:, i] - values[:, i - j]) / corner[:, i, i, None]
                block[:, i + 1 :].addcmul_(corner[:, i, i + 1 :, None], errors[:, i, None], value=-1)
        remaining[:, stop:] -= factor[:, start:stop, stop:].mT @ errors
    found = torch.empty_like(codes)
    found[each, order] = codes
    return _rows_first(found)


def _columns_first(rows: Tensor, count: int) -> Tensor:
    """(B * out, n) to a view (B, n, out)."""
    return rows.reshape(count, -1, rows.shape[1]).mT


def _rows_first(columns: Tensor) -> Tensor:
    """(B, n, out) to (B * out, n)."""
    return columns.mT.reshape(-1, columns.shape[1])


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
    """`sweeps` passes of cyclic coordinate descent over the columns (vectors); the objective never rises. A weight that
    has settled stays as it is while others of its batch go on. `hessian` is (in, in) or (B, in, in).

    Inside a block of columns only the block's own gradient is kept up to date; the rest follows in one product.
    """
    if not sweeps:
        return codes.clone()
    shape = (weight.shape[0], weight.shape[1])
    hessian = hessian.reshape(-1, shape[1], shape[1])
    count, width = len(hessian), coded_together(fmt, params)
    size = max(BLOCK // width * width, width)
    values = _columns_first(fmt.value(codes, grid, params, shape), count)
    values = values.to(hessian.dtype).contiguous()
    codes = _columns_first(codes, count).clone(memory_format=torch.contiguous_format)
    gradient = hessian @ (_columns_first(weight, count) - values)
    step = (_column if width == 1 else _vector)(shape, hessian, grid, fmt, params)
    for _ in range(sweeps):
        changed = False
        for start in range(0, shape[1], size):
            block = slice(start, min(start + size, shape[1]))
            before, old = values[:, block].clone(), codes[:, block].clone()
            _descend_block(step, codes, values, gradient, hessian, block, width)
            if not torch.equal(old, codes[:, block]):
                gradient.baddbmm_(hessian[:, :, block], before - values[:, block])
                changed = True
        if not changed:
            break
    return _rows_first(codes)


# column or vector, its values (B, w, out) and their gradient -> the best codes and values with all others fixed
Step = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]


def _column(shape: tuple[int, int], hessian: Tensor, grid: Any, fmt: ModuleType, params: Any) -> Step:
    inverse = 1 / hessian.diagonal(dim1=1, dim2=2)

    def step(column: slice, values: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.addcmul(values, gradient, inverse[:, column, None])
        codes = fmt.code(best.reshape(-1, 1).float(), grid, params, shape, column)
        return codes.view(best.shape), fmt.value(codes, grid, params, shape, column).view(best.shape)

    return step


def _vector(shape: tuple[int, int], hessian: Tensor, grid: Any, fmt: ModuleType, params: Any) -> Step:
    width, count = fmt.width(params), len(hessian)
    metrics = {k: hessian[:, k : k + width, k : k + width].double() for k in range(0, shape[1], width)}
    nearest = fmt.Nearest(grid, params, metrics)
    inverses = {k: torch.linalg.inv(metric).to(hessian.dtype) for k, metric in metrics.items()}

    def step(column: slice, values: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        best = values + inverses[column.start] @ gradient
        index, found = nearest(column.start, _rows_first(best).double())
        return index.view(count, 1, -1).to(torch.int32), _columns_first(found, count)

    return step


def _descend_block(
    step: Step, codes: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor, block: slice, width: int
) -> None:
    """One pass over the columns of a block; changes `codes` and `values` there."""
    local, corner = gradient[:, block].clone(), hessian[:, block, block].unsqueeze(-1)
    for k in range(block.start, block.stop, width):
        column, stop = slice(k, min(k + width, block.stop)), min(k + width, block.stop) - block.start
        old = values[:, column]
        codes[:, column], new = step(column, old, local[:, k - block.start : stop])
        moved, after = old - new, local[:, stop:]
        for i in range(column.stop - k):
            after.addcmul_(corner[:, k - block.start + i, stop:], moved[:, i : i + 1])
        values[:, column] = new


def alternate(
    weight: Tensor, codes: Tensor, hessian: Tensor, grids: Sequence[Any], fmt: ModuleType, params: Any, rounds: int,
    sweeps: int,
) -> tuple[Tensor, list[Any]]:  # fmt: skip
    """`rounds` of refitting scales or codebooks to the codes and descending on the codes; a round that does not lower
    the objective of a weight is undone and ends it. `hessian` (B, in, in), a grid for each of B weights."""
    best, count = list(grids), len(grids)
    shape = (weight.shape[0] // count, weight.shape[1])
    weights, codes = weight.reshape(count, *shape), codes.reshape(count, *shape).clone()

    def loss(some: list[int], found: Tensor, using: Sequence[Any]) -> list[float]:
        values = fmt.value(found, stacked(using, fmt, shape), params)
        errors = objective(take(weights, some).reshape(-1, shape[1]), values, take(hessian, some))
        return errors.reshape(len(some), -1).sum(1).tolist()

    going = list(range(count))
    least = loss(going, codes.reshape(-1, shape[1]), best)
    for _ in range(rounds if hasattr(fmt, "refit") else 0):
        tried = [fmt.refit(weights[i], codes[i], best[i], params, hessian[i]) for i in going]
        if not going or tried[0] is None:
            break
        some, grid = take(weights, going).reshape(-1, shape[1]), stacked(tried, fmt, shape)
        start = take(codes, going).reshape(-1, shape[1])
        new = descend(some, start, take(hessian, going), grid, fmt, params, sweeps)
        losses = loss(going, new, tried)
        better = [n for n, i in enumerate(going) if losses[n] < least[i]]
        for n in better:
            i = going[n]
            codes[i], best[i], least[i] = new.reshape(-1, *shape)[n], tried[n], losses[n]
        going = [going[n] for n in better]
    return codes.reshape(-1, shape[1]), best


def take(batch: Tensor, places: Sequence[int]) -> Tensor:
    """Some of a batch, (B, ...) to (n, ...)."""
    return batch.index_select(0, torch.tensor(places).to(batch.device))


def stacked(grids: Sequence[Any], fmt: ModuleType, shape: tuple[int, int]) -> Any:
    """One grid for weights of `shape`, one under the other (see formats/base.py)."""
    return grids[0] if len(grids) == 1 else getattr(fmt, "stack", stack_rows)(grids, shape)


def excess(weight: Tensor, quantized: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """By how much the objective of `quantized` is above that of `other` per output row, in one product."""
    shape = (*hessian.shape[:-2], -1, weight.shape[1])
    less = (other - quantized).to(hessian.dtype).reshape(shape)
    both = (2 * weight - quantized - other).to(hessian.dtype).reshape(shape)
    return ((less @ hessian) * both).sum(-1).flatten()


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) per output row, shape (B * out,); `hessian` is (in, in) or (B, in, in)."""
    error = (weight - quantized).to(hessian.dtype).reshape(*hessian.shape[:-2], -1, weight.shape[1])
    return ((error @ hessian) * error).sum(-1).flatten()
