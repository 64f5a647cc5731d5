"""Small floats: value = scale * element, elements of 4, 6 or 8 bits (see `_floats`).

E4M3 and E5M2 as in Micikevicius et al. 2022, E2M1, E2M3 and E3M2 as in OCP MX v1.0, E3M0 and E1M2 as in HQ-DiT and
LLM-FP4. The scale maps the largest magnitude of its group to the largest element. Codes are raw bit patterns.
Shapes: N rows (out), K columns (in), G groups of consecutive input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import _floats, _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns, Grid
from .base import StrictParams


class Params(StrictParams):
    """`clip`: shrink factors tried for each scale (1: none); the factor with the least error wins."""

    element: _floats.Element = "e4m3"
    layout: Literal["tensor", "row", "group"] = "row"
    group: int = Field(32, ge=2)
    scale: _scales.ScaleType = "float32"
    clip: int = Field(1, ge=1, le=100)

    @model_validator(mode="after")
    def _two_level_needs_groups(self) -> Params:
        if self.scale == "uint8" and self.layout != "group":
            raise ValueError("scale: uint8 needs layout: group")
        return self


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the columns' squared errors in the clip search."""
    top, nearest = _floats.largest(params.element), partial(_floats.nearest, element=params.element)
    return _scales.fit_scale(weight, importance, params.layout, params.group, params.scale, params.clip, top, nearest)


def _scale(grid: Grid, params: Params, shape: tuple[int, int], columns: Columns | None) -> Tensor:
    where = _scales.whole(shape[1], columns)
    return _scales.expand(grid.scale, params.layout, params.group, shape, where)


def refit(weight: Tensor, codes: Tensor, grid: Grid, params: Params, hessian: Tensor) -> Grid | None:
    """The grid with the best scales for given codes under the Hessian (K, K)."""
    units = _floats.decode(codes, params.element)
    scale = _scales.keep_sound(_scales.refit(weight, units, hessian, params.layout, params.group), grid.scale)
    if scale is None:
        return None
    row = _scales.row_scales(scale, params.scale)
    return Grid(_scales.rounded(scale, params.scale, row), row)


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Bit patterns, int32. With `columns`, `weight` holds only those columns of a matrix of `shape`."""
    shape = shape or (weight.shape[0], weight.shape[1])
    return _floats.encode(weight / _scale(grid, params, shape, columns), params.element)


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of some `columns` of a matrix of `shape`."""
    shape = shape or (codes.shape[0], codes.shape[1])
    return _floats.decode(codes, params.element) * _scale(grid, params, shape, columns)


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    width = packed_width(shape[1], _floats.bits(params.element))
    grid = _scales.grid_shape(params.layout, params.group, shape)
    return {"qweight": ((shape[0], width), torch.uint8), **_scales.declare(params.scale, grid)}


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them."""
    packed = pack_bits(codes, _floats.bits(params.element))
    scales = _scales.store(grid.scale, grid.row_scale, params.scale)
    return {name: tensor.contiguous() for name, tensor in {"qweight": packed, **scales}.items()}


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    codes = unpack_bits(tensors["qweight"], _floats.bits(params.element), shape[1]).to(torch.int32)
    return codes, _scales.load(tensors, params.scale)
