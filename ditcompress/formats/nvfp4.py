"""NVFP4: value = tensor scale * block scale * e2m1, one E4M3 block scale for 16 consecutive input columns.

Tensor scale (float32) = largest magnitude / (448 * 6), so that the largest block scale is 448, the top of E4M3. Block
scales stay at or above 2**-6 as in torchao. `four_over_six` (Cook et al. 2025) also tries the scale that maps the
largest magnitude of a block to 4 instead of 6, since e2m1 has nothing in between. Codes are bit patterns of e2m1.
Shapes: N rows (out), K columns (in), B blocks in a row; the last block of a row may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from . import _floats, _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns
from .base import StrictParams

BLOCK = 16
_ELEMENT, _SCALE = "e2m1", "e4m3"
_LOWEST_SCALE = 2.0**-6  # the smallest normal E4M3


class Params(StrictParams):
    """`clip`: shrink factors tried for each block scale (1: none); the one with the least error wins."""

    four_over_six: bool = False
    clip: int = Field(1, ge=1, le=100)


@dataclass(frozen=True)
class Grid:
    """`block` (N, B) holds E4M3 values, `tensor` is (1, 1); both float32."""

    block: Tensor
    tensor: Tensor

    @property
    def scale(self) -> Tensor:
        return self.block * self.tensor


def _block_scale(largest: Tensor, tensor: Tensor) -> Tensor:
    """The E4M3 block scale that maps `largest` to 6."""
    scale = largest / _floats.largest(_ELEMENT) / tensor
    return _floats.nearest(scale.clamp(_LOWEST_SCALE, _floats.largest(_SCALE)), _SCALE)


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the columns' squared errors in the search."""
    groups = _scales.grouped(weight, "group", BLOCK)
    largest = groups.abs().amax(-1)
    top = _floats.largest(_ELEMENT) * _floats.largest(_SCALE)
    tensor = (largest.max() / top).clamp_min(_scales.SMALLEST["float32"]).reshape(1, 1)
    factors = torch.linspace(1.0, 0.4, params.clip).tolist() if params.clip > 1 else [1.0]
    factors += [1.5] if params.four_over_six else []
    candidates = ((_block_scale(largest * factor, tensor),) for factor in factors)
    if len(factors) == 1:
        return Grid(next(candidates)[0], tensor)

    def decode(values: Tensor, candidate: tuple[Tensor, ...]) -> Tensor:
        scale = (candidate[0] * tensor).unsqueeze(-1)
        return _floats.nearest(values / scale, _ELEMENT) * scale

    cost = _scales.costs(weight, importance, "group", BLOCK)
    return Grid(_scales.least_error(groups, cost, candidates, decode)[0], tensor)


def _scale(grid: Grid, shape: tuple[int, int], columns: Columns | None) -> Tensor:
    return _scales.expand(grid.block, "group", BLOCK, shape, _scales.whole(shape[1], columns)) * grid.tensor


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Bit patterns, int32. With `columns`, `weight` holds only those columns of a matrix of `shape`."""
    shape = shape or (weight.shape[0], weight.shape[1])
    return _floats.encode(weight / _scale(grid, shape, columns), _ELEMENT)


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of some `columns` of a matrix of `shape`."""
    shape = shape or (codes.shape[0], codes.shape[1])
    return _floats.decode(codes, _ELEMENT) * _scale(grid, shape, columns)


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    return {
        "qweight": ((shape[0], packed_width(shape[1], 4)), torch.uint8),
        "scale": (_scales.grid_shape("group", BLOCK, shape), torch.uint8),
        "tensor_scale": ((1, 1), torch.float32),
    }


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them; block scales are the bytes of torch.float8_e4m3fn."""
    return {
        "qweight": pack_bits(codes, 4).contiguous(),
        "scale": _floats.encode(grid.block, _SCALE).to(torch.uint8).contiguous(),
        "tensor_scale": grid.tensor,
    }


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    codes = unpack_bits(tensors["qweight"], 4, shape[1]).to(torch.int32)
    return codes, Grid(_floats.decode(tensors["scale"].to(torch.int32), _SCALE), tensors["tensor_scale"])
