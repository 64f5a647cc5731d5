"""Vector quantization: value = row scale * codebook[code], the codebook found by k-means (VQ4DiT, Deng et al. 2024).

A vector is `dim` consecutive input columns of a row; 2**bits entries are shared by the whole matrix or by each block
of `rows` output rows, so a weight costs bits / dim bits and the codebook. The last vector of a row is compared on the
columns that exist. The code of a vector is repeated on each of its columns, so that codes have the shape of the
weight as in every format; columns are coded `width(params)` at a time.
Shapes: N rows (out), K columns (in), V vectors in a row, B codebooks, C entries, d columns of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from . import _kmeans, _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns
from .base import StrictParams

CONJUGATE = 30  # steps of conjugate gradients when codebooks are fitted
SETTLED = 1e-9  # of the first residual's square: the codebooks are rounded to float16 anyway
DRAFT = 4096  # vectors that a draft is trained on
_LARGEST = torch.finfo(torch.float16).max


class Params(StrictParams):
    """`rows`: output rows that share a codebook (None: all). `row_scale`: rows are divided by a float16 root mean
    square first. `samples`: the most vectors that a codebook is trained on (None: all; it saves time on large ones)."""

    bits: int = Field(8, ge=1, le=12)
    dim: int = Field(4, ge=1, le=32)
    rows: int | None = Field(None, ge=1)
    row_scale: bool = False
    init: Literal["kmeans++", "random"] = "kmeans++"
    iterations: int = Field(25, ge=0, le=1000)
    seed: int = 0
    samples: int | None = Field(None, ge=2)


@dataclass(frozen=True)
class Grid:
    """`codebook` (B, C, d) and `row_scale` (N, 1) or None, float32 holding float16 values; `rows` of a codebook."""

    codebook: Tensor
    row_scale: Tensor | None
    rows: int


def width(params: Params) -> int:
    """Columns that are coded together."""
    return params.dim


def _vectors(weight: Tensor, dim: int) -> Tensor:
    """(N, K) to (N, V, d), zeros at the end."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % dim)).reshape(len(weight), -1, dim)


def _importance(weight: Tensor, importance: Tensor | None, dim: int) -> Tensor:
    """Cost of an error in each element of a vector, (1, V, d): one number per vector, because `code` knows no
    importance and must choose the same entry; 0 for padding."""
    real = _vectors(torch.ones_like(weight[:1]), dim)
    if importance is None:
        return real
    mean = _vectors(importance.to(weight)[None], dim).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    return real * mean / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the vectors of those columns."""
    scale = None
    if params.row_scale:
        scale = weight.square().mean(1, keepdim=True).sqrt()
        scale = scale.clamp(_scales.SMALLEST["float16"], _LARGEST).to(torch.float16).float()
        weight = weight / scale
    vectors = _vectors(weight, params.dim)
    cost = _importance(weight, importance, params.dim).expand_as(vectors)
    if scale is not None:  # an error in a large row costs more
        cost = cost * (scale / scale.amax()).square().unsqueeze(-1)
    rows = params.rows or len(weight)
    codebooks = []
    for part, part_cost in zip(vectors.split(rows), cost.split(rows), strict=True):
        x, c = part.flatten(0, 1), part_cost.flatten(0, 1)
        x, c = _kmeans.sampled(x, c, params.samples or len(x), params.seed)
        codebooks.append(_kmeans.kmeans(x, c, 2**params.bits, params.init, params.iterations, params.seed))
    stored = torch.stack(codebooks).clamp(-_LARGEST, _LARGEST).to(torch.float16).float()
    return Grid(stored, scale, rows)


def draft(params: Params) -> Params:
    """Parameters under which the error of a weight is estimated in a fraction of the time."""
    few = min(params.samples or DRAFT, DRAFT)
    return params.model_copy(update={"samples": few, "iterations": min(params.iterations, 8)})


def refit(weight: Tensor, codes: Tensor, grid: Grid, params: Params, hessian: Tensor) -> Grid:
    """The grid with the codebooks of least tr((W - Q) H (W - Q)^T) for given codes, H (K, K).

    A least squares problem in the C * d numbers of each codebook, by conjugate gradients on its normal equations, which
    are never formed.
    """
    place = torch.arange(weight.shape[1], device=weight.device) % params.dim
    codes, rows = codes.long(), len(weight)
    block = (torch.arange(rows, device=weight.device) // grid.rows)[:, None]
    flat = ((block * grid.codebook.shape[1] + codes) * params.dim + place).flatten()
    scale = torch.ones(rows, 1) if grid.row_scale is None else grid.row_scale
    scale = scale.to(hessian)

    def gather(book: Tensor) -> Tensor:
        return book.flatten()[flat].reshape(codes.shape) * scale

    def scatter(values: Tensor) -> Tensor:
        return (
            torch.zeros(grid.codebook.numel()).to(hessian).index_add_(0, flat, ((values @ hessian) * scale).flatten())
        )

    book = grid.codebook.to(hessian).flatten()
    residual = scatter(weight.to(hessian) - gather(book))
    direction, power = residual.clone(), residual @ residual
    enough = SETTLED * power
    for _ in range(CONJUGATE):
        image = scatter(gather(direction))
        bend = direction @ image
        if power <= enough or bend <= 0:
            break
        step = power / bend
        book, residual = book + step * direction, residual - step * image
        before, power = power, residual @ residual
        direction = residual + power / before * direction
    fitted = book.reshape(grid.codebook.shape).float().clamp(-_LARGEST, _LARGEST)
    fitted = torch.where(torch.isfinite(fitted), fitted, grid.codebook)
    return Grid(fitted.to(torch.float16).float(), grid.row_scale, grid.rows)


def stackable(params: Params, rows: int) -> bool:
    """Whether grids of several weights can be stacked: where no codebook would serve rows of two of them."""
    return params.rows is None or rows % params.rows == 0


def stack(grids: Sequence[Grid], shape: tuple[int, int]) -> Grid:
    """One grid for weights of `shape`, one under the other."""
    scales = [grid.row_scale for grid in grids if grid.row_scale is not None]
    return Grid(torch.cat([grid.codebook for grid in grids]), torch.cat(scales) if scales else None, grids[0].rows)


def _parts(rows: Tensor, size: int) -> Tensor:
    """(N, n) to (B, size, n), one part for each codebook; a last short one ends in zeros."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % size)).reshape(-1, size, rows.shape[1])


class Nearest:
    """The nearest entry to one vector of every row under that vector's own metric, M (d, d) or (L, d, d) for L weights
    whose grids are stacked, positive definite: least (q - t) M (q - t)^T. What does not depend on t is made once; all
    float64."""

    def __init__(self, grid: Grid, params: Params, metrics: Mapping[int, Tensor]) -> None:
        self.rows, self.books = grid.rows, grid.codebook.double()
        self.scale = None if grid.row_scale is None else grid.row_scale.double()
        self.first = torch.arange(len(self.books), device=self.books.device)[:, None]
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        for column, metric in metrics.items():  # |q - t|^2 = q M q - 2 t M q + what is the same for all entries
            metric = metric.reshape(-1, *metric.shape[-2:])
            entries = self.books[..., : metric.shape[-1]]
            images = entries @ metric.repeat_interleave(len(entries) // len(metric), 0)
            self.parts[column] = (images * entries).sum(-1).unsqueeze(1), images.mT

    def __call__(self, column: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (N,) int64 and values (N, w) of the vector that starts at `column`; target (N, w)."""
        count, width = target.shape
        target = target if self.scale is None else target / self.scale
        norms, images = self.parts[column]
        index = torch.baddbmm(norms, _parts(target, self.rows), images, alpha=-2).min(-1).indices
        value = self.books[self.first, index, :width].reshape(-1, width)[:count]
        return index.flatten()[:count], value if self.scale is None else value * self.scale


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Nearest entries, int32, repeated on the columns of each vector: the shape of `weight`.

    With `columns`, `weight` holds only those columns of a matrix of `shape`; they must be whole vectors.
    """
    shape = shape or (weight.shape[0], weight.shape[1])
    where = _scales.whole(shape[1], columns)
    if isinstance(where, slice) and (where.start % params.dim or (where.stop % params.dim and where.stop != shape[1])):
        raise ValueError(f"columns {where.start}:{where.stop} are not whole vectors of {params.dim}")
    # float64: distances are differences of products, and coding a decoded vector must find the same entry
    weight = weight.double() if grid.row_scale is None else weight.double() / grid.row_scale
    vectors, real = _vectors(weight, params.dim), _vectors(torch.ones_like(weight), params.dim)
    if vectors.shape[1] == 1:  # one vector a row: all codebooks at once
        entries = grid.codebook[..., : weight.shape[1]].double()
        norms = entries.square().sum(-1).unsqueeze(1)
        found = torch.baddbmm(norms, _parts(weight, grid.rows), entries.mT, alpha=-2).min(-1).indices
        return found.reshape(-1, 1)[: len(weight)].expand(-1, weight.shape[1]).to(torch.int32)
    indices = [
        _kmeans.nearest(v.flatten(0, 1), r.flatten(0, 1), book.double())[0].reshape(v.shape[:2])
        for v, r, book in zip(vectors.split(grid.rows), real.split(grid.rows), grid.codebook, strict=True)
    ]
    return torch.cat(indices).repeat_interleave(params.dim, 1)[:, : weight.shape[1]].to(torch.int32)


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of any `columns` of a matrix of `shape`."""
    where = _scales.whole(codes.shape[1], columns)
    block = torch.arange(len(codes), device=codes.device) // grid.rows
    if isinstance(where, slice):
        where = torch.arange(where.start, where.stop, device=codes.device)
    place = where % params.dim
    values = grid.codebook[block[:, None], codes.long(), place]
    return values if grid.row_scale is None else values * grid.row_scale


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    rows, columns = shape
    books = 1 if params.rows is None else -(-rows // params.rows)
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((rows, packed_width(-(-columns // params.dim), params.bits)), torch.uint8),
        "codebook": ((books, 2**params.bits, params.dim), torch.float16),
    }
    if params.row_scale:
        stored["row_scale"] = ((rows, 1), torch.float16)
    return stored


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them: one index for each vector."""
    stored = {
        "qweight": pack_bits(codes[:, :: params.dim], params.bits).contiguous(),
        "codebook": grid.codebook.to(torch.float16).contiguous(),
    }
    if grid.row_scale is not None:
        stored["row_scale"] = grid.row_scale.to(torch.float16).contiguous()
    return stored


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    indices = unpack_bits(tensors["qweight"], params.bits, -(-shape[1] // params.dim)).to(torch.int32)
    codes = indices.repeat_interleave(params.dim, 1)[:, : shape[1]]
    scale = tensors["row_scale"].float() if params.row_scale else None
    return codes, Grid(tensors["codebook"].float(), scale, params.rows or shape[0])
