"""OCP Microscaling (MX) v1.0: value = 2**(exponent - 127) * element, one exponent for 32 consecutive input columns.

Elements e2m1 (MXFP4), e2m3 and e3m2 (MXFP6), e4m3 and e5m2 (MXFP8); codes are their raw bit patterns. The exponent
(E8M0) is one byte. The last block of a row may be shorter. Shapes: N rows (out), K columns (in), B blocks in a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from . import _floats, _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns, Grid
from .base import StrictParams

BLOCK = 32
_BIAS, _HIGHEST = 127, 254  # 255 is NaN


class Params(StrictParams):
    """How the shared exponent is chosen. `floor`: floor(log2(largest)) - largest exponent of the element (section 6.3
    of the specification); `even`: the same after rounding the largest to the element's mantissa, which saturates
    less; `best`: that of floor - 1, floor, floor + 1 with the least squared error."""

    element: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"] = "e2m1"
    scale: Literal["floor", "even", "best"] = "floor"


def _exponent(largest: Tensor, params: Params) -> Tensor:
    """Biased exponents, int32 (N, B), of the largest magnitudes; 0 for a block of zeros."""
    bits = largest.view(torch.int32)
    if params.scale == "even":  # half a unit in the last place of the element's mantissa; a carry goes to the exponent
        bits = bits + (1 << (23 - int(params.element[3]) - 1))
    top = math.floor(math.log2(_floats.largest(params.element)))
    return ((bits >> 23) - top).clamp(0, _HIGHEST)


def _power(exponent: Tensor) -> Tensor:
    """2**(exponent - 127), float32 and exact (0 is subnormal, hence float64)."""
    return torch.exp2(exponent.double() - _BIAS).float()


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the columns' squared errors for `best`."""
    groups = _scales.grouped(weight, "group", BLOCK)
    exponent = _exponent(groups.abs().amax(-1).contiguous(), params)
    if params.scale != "best":
        return Grid(_power(exponent))

    def decode(values: Tensor, candidate: tuple[Tensor, ...]) -> Tensor:
        scale = candidate[0].unsqueeze(-1)
        return _floats.nearest(values / scale, params.element) * scale

    candidates = ((_power((exponent + shift).clamp(0, _HIGHEST)),) for shift in (0, -1, 1))
    cost = _scales.costs(weight, importance, "group", BLOCK)
    return Grid(_scales.least_error(groups, cost, candidates, decode)[0])


def _scale(grid: Grid, shape: tuple[int, int], columns: Columns | None) -> Tensor:
    return _scales.expand(grid.scale, "group", BLOCK, shape, _scales.whole(shape[1], columns))


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Bit patterns, int32. With `columns`, `weight` holds only those columns of a matrix of `shape`."""
    shape = shape or (weight.shape[0], weight.shape[1])
    return _floats.encode(weight / _scale(grid, shape, columns), params.element)


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of some `columns` of a matrix of `shape`."""
    shape = shape or (codes.shape[0], codes.shape[1])
    return _floats.decode(codes, params.element) * _scale(grid, shape, columns)


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    width = packed_width(shape[1], _floats.bits(params.element))
    return {
        "qweight": ((shape[0], width), torch.uint8),
        "scale": (_scales.grid_shape("group", BLOCK, shape), torch.uint8),
    }


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them."""
    exponent = torch.frexp(grid.scale.double()).exponent - 1 + _BIAS  # a power of two is 0.5 * 2**exponent there
    return {
        "qweight": pack_bits(codes, _floats.bits(params.element)).contiguous(),
        "scale": exponent.to(torch.uint8).contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    codes = unpack_bits(tensors["qweight"], _floats.bits(params.element), shape[1]).to(torch.int32)
    return codes, Grid(_power(tensors["scale"]))
