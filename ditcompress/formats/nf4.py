"""NormalFloat 4 (QLoRA, Dettmers et al. 2023, appendix E): value = scale * table[code].

The table holds 16 quantiles of a normal distribution scaled to [-1, 1], as in bitsandbytes. Each `block` of
consecutive input columns in a row has one scale, its largest magnitude; bitsandbytes cuts the flattened matrix into
blocks instead, which is the same wherever K is a multiple of `block`. Its packing puts the first code into the high
half of a byte, ours into the low half. Shapes: N rows (out), K columns (in), B blocks in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from . import _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns, Grid
from .base import StrictParams

# fmt: off
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
_MIDDLE = tuple((low + high) / 2 for low, high in pairwise(TABLE))


class Params(StrictParams):
    """`clip`: shrink factors tried for each scale (1: none); the factor with the least error wins."""

    block: int = Field(64, ge=2)
    scale: _scales.ScaleType = "float32"
    clip: int = Field(1, ge=1, le=100)


def _encode(values: Tensor) -> Tensor:
    return torch.bucketize(values, torch.tensor(_MIDDLE, device=values.device), out_int32=True)


def _decode(codes: Tensor) -> Tensor:
    return torch.tensor(TABLE, device=codes.device)[codes.long()]


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the columns' squared errors in the clip search."""
    return _scales.fit_scale(
        weight, importance, "group", params.block, params.scale, params.clip, 1.0, lambda v: _decode(_encode(v))
    )


def _scale(grid: Grid, params: Params, shape: tuple[int, int], columns: Columns | None) -> Tensor:
    return _scales.expand(grid.scale, "group", params.block, shape, _scales.whole(shape[1], columns))


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Indices into the table, int32. With `columns`, `weight` holds only those columns of a matrix of `shape`."""
    shape = shape or (weight.shape[0], weight.shape[1])
    return _encode(weight / _scale(grid, params, shape, columns))


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of some `columns` of a matrix of `shape`."""
    shape = shape or (codes.shape[0], codes.shape[1])
    return _decode(codes) * _scale(grid, params, shape, columns)


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    grid = _scales.grid_shape("group", params.block, shape)
    packed = ((shape[0], packed_width(shape[1], 4)), torch.uint8)
    return {"qweight": packed, **_scales.declare(params.scale, grid)}


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them."""
    scales = _scales.store(grid.scale, grid.row_scale, params.scale)
    return {name: tensor.contiguous() for name, tensor in {"qweight": pack_bits(codes, 4), **scales}.items()}


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    codes = unpack_bits(tensors["qweight"], 4, shape[1]).to(torch.int32)
    return codes, _scales.load(tensors, params.scale)
