"""Uniform integers of 2 to 8 bits: value = scale * (code - zero).

Layouts: one scale per `tensor`; per `row`; per `group` of consecutive input columns in a row; per `column_group` of
rows that share one input column (DiTAS: a per-input-channel factor folds into the scales exactly). A last group may
be shorter than the others, so every width is legal.

Scales are stored as float32, bfloat16 or float16, or in two levels (`uint8`, `uint4`: `_scales.py`), which is how small
groups stay cheap; with `uint4` the decoded weight is INT8 times one scale a row. Zeros are stored in `bits` bits next
to the codes ("code"), or as int16.
Shapes: N rows (out), K columns (in), G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns
from .base import StrictParams


class Params(StrictParams):
    """`levels`: the range is divided by 2**bits - 1, or by 2**bits ("full", as DiTAS does). `clip`: shrink factors
    tried for each scale (1: none); the factor with the least error, weighted by channel importance, wins."""

    bits: int = Field(8, ge=2, le=8)
    layout: Literal["tensor", "row", "group", "column_group"] = "row"
    group: int = Field(32, ge=2)
    symmetric: bool = True
    scale: Literal["float32", "float16", "bfloat16", "uint8", "uint4"] = "float32"
    zero: Literal["code", "int16"] = "code"
    levels: Literal["full", "minus_one"] = "minus_one"
    clip: int = Field(1, ge=1, le=100)

    @model_validator(mode="after")
    def _two_level_needs_groups(self) -> Params:
        if self.scale in ("uint8", "uint4") and self.layout != "group":
            raise ValueError(f"scale: {self.scale} needs layout: group")
        if self.scale == "uint4" and not self.symmetric and self.zero != "code":
            raise ValueError("scale: uint4 needs zero: code")
        if self.scale == "uint4" and self.bits == 8:
            raise ValueError("scale: uint4 leaves room for 7 bits; take layout: row for INT8")
        return self


@dataclass(frozen=True)
class Grid:
    """`scale` float32 and `zero` int32 or None, both in the shape of the layout; `row_scale` (N, 1) when the
    scales are two-level. `order` maps a row or column to its group."""

    scale: Tensor
    zero: Tensor | None
    row_scale: Tensor | None = None


def _grid_shape(params: Params, shape: tuple[int, int]) -> tuple[int, int]:
    return _scales.grid_shape(params.layout, params.group, shape)


def _expand(values: Tensor, params: Params, shape: tuple[int, int], columns: Columns) -> Tensor:
    return _scales.expand(values, params.layout, params.group, shape, columns)


def _code_range(params: Params) -> tuple[int, int]:
    """Lowest and highest code: symmetric codes leave out the most negative one except at 2 bits."""
    if not params.symmetric:
        return 0, 2**params.bits - 1
    top = 2 ** (params.bits - 1) - 1
    return (-top if params.bits > 2 else -top - 1), top


def _scale_zero(low: Tensor, high: Tensor, params: Params) -> tuple[Tensor, Tensor | None]:
    """Scale and integer zero for value ranges [low, high]."""
    lowest, highest = _code_range(params)
    if params.symmetric:
        return torch.maximum(high / highest, low / lowest).clamp_min(_scales.SMALLEST[params.scale]), None
    if params.zero == "code":  # the zero is itself a code, so the range must contain 0
        low, high = low.clamp_max(0), high.clamp_min(0)
    steps = 2**params.bits - (params.levels == "minus_one")
    scale = ((high - low) / steps).clamp_min(_scales.SMALLEST[params.scale])
    zero = torch.round(-low / scale).to(torch.int32)
    return scale, zero.clamp(0, highest) if params.zero == "code" else zero.clamp(-(2**15), 2**15 - 1)


def make_grid(scale: Tensor, zero: Tensor | None, params: Params) -> Grid:
    """A grid whose scales are rounded to their stored precision."""
    lowest, highest = _code_range(params)
    reach = float(max(highest, -lowest)) if zero is None else torch.maximum(zero, highest - zero).float()
    row = _scales.row_scales(scale, params.scale, reach)
    return Grid(_scales.rounded(scale, params.scale, row, reach), zero, row)


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the columns' squared errors in the clip search."""
    groups = _scales.grouped(weight, params.layout, params.group)
    cost = _scales.costs(weight, importance, params.layout, params.group)
    low, high = groups.amin(-1), groups.amax(-1)
    if params.clip == 1:
        return make_grid(*_scale_zero(low, high, params), params)

    def decode(values: Tensor, candidate: tuple[Tensor, ...]) -> Tensor:
        scale = candidate[0]
        if params.scale not in ("uint8", "uint4"):  # the row scale of the two-level form is only known after the search
            scale = _scales.rounded(scale, params.scale, None)
        return _round_trip(values, scale.unsqueeze(-1), candidate[1] if len(candidate) > 1 else None, params)

    ranges = ((low * shrink, high * shrink) for shrink in torch.linspace(1.0, 0.4, params.clip).tolist())
    pairs = (_scale_zero(lowest, highest, params) for lowest, highest in ranges)
    best = _scales.least_error(groups, cost, ((s,) if z is None else (s, z) for s, z in pairs), decode)
    return make_grid(best[0], best[1] if len(best) > 1 else None, params)


def _round_trip(groups: Tensor, scale: Tensor, zero: Tensor | None, params: Params) -> Tensor:
    offset = 0 if zero is None else zero.unsqueeze(-1)
    codes = (torch.round(groups / scale) + offset).clamp(*_code_range(params))
    return (codes - offset) * scale


def refit(weight: Tensor, codes: Tensor, grid: Grid, params: Params, hessian: Tensor) -> Grid | None:
    """The grid with the best scales for given codes under the Hessian (K, K); zeros stay."""
    shape = (weight.shape[0], weight.shape[1])
    units = codes if grid.zero is None else codes - _expand(grid.zero, params, shape, slice(0, shape[1]))
    scale = _scales.keep_sound(_scales.refit(weight, units, hessian, params.layout, params.group), grid.scale)
    return None if scale is None else make_grid(scale, grid.zero, params)


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Nearest codes, int32. With `columns`, `weight` holds only those columns of a matrix of `shape`."""
    shape = shape or (weight.shape[0], weight.shape[1])
    where = _scales.whole(shape[1], columns)
    codes = torch.round(weight / _expand(grid.scale, params, shape, where))
    if grid.zero is not None:
        codes = codes + _expand(grid.zero, params, shape, where)
    return codes.clamp(*_code_range(params)).to(torch.int32)


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of some `columns` of a matrix of `shape`."""
    shape = shape or (codes.shape[0], codes.shape[1])
    where = _scales.whole(shape[1], columns)
    if grid.zero is not None:
        codes = codes - _expand(grid.zero, params, shape, where)
    return codes * _expand(grid.scale, params, shape, where)


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    rows, columns = shape
    grid = _grid_shape(params, shape)
    plain_int8 = params.bits == 8 and params.symmetric
    width = columns if plain_int8 else packed_width(columns, params.bits)
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((rows, width), torch.int8 if plain_int8 else torch.uint8)
    }
    stored |= _scales.declare(params.scale, grid)
    if not params.symmetric:
        code_zero = ((grid[0], packed_width(grid[1], params.bits)), torch.uint8)
        stored["zero"] = code_zero if params.zero == "code" else (grid, torch.int16)
    return stored


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them."""
    lowest, _ = _code_range(params)
    plain = params.bits == 8 and params.symmetric
    packed = codes.to(torch.int8) if plain else pack_bits(codes - lowest, params.bits)
    scales = _scales.store(grid.scale, grid.row_scale, params.scale)
    zeros = {}
    if grid.zero is not None:
        zeros["zero"] = pack_bits(grid.zero, params.bits) if params.zero == "code" else grid.zero.to(torch.int16)
    return {name: tensor.contiguous() for name, tensor in {"qweight": packed, **scales, **zeros}.items()}


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    lowest, _ = _code_range(params)
    packed = tensors["qweight"]
    if packed.dtype == torch.int8:
        codes = packed.to(torch.int32)
    else:
        codes = unpack_bits(packed, params.bits, shape[1]).to(torch.int32) + lowest
    scales = _scales.load(tensors, params.scale, _grid_shape(params, shape)[1])
    zero = None
    if not params.symmetric:
        zero = tensors["zero"]
        if params.zero == "code":
            zero = unpack_bits(zero, params.bits, _grid_shape(params, shape)[1])
        zero = zero.to(torch.int32)
    return codes, Grid(scales.scale, zero, scales.row_scale)


def stackable(params: Params, rows: int) -> bool:
    """Whether grids of several weights can be stacked: not with scales that rows share by their number."""
    return params.layout != "column_group"


def is_int8(params: Params) -> bool:
    """Whether `as_int8` can be asked for."""
    return params.scale == "uint4" or (params.layout in ("row", "tensor") and params.symmetric)


def as_int8(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The weight as INT8 (N, K) times a float32 scale a row (N, 1), exactly."""
    if params.scale != "uint4":
        codes = tensors["qweight"]
        if codes.dtype != torch.int8:
            codes = (unpack_bits(codes, params.bits, shape[1]) + _code_range(params)[0] % 256).view(torch.int8)
        return codes, tensors["scale"].float().expand(shape[0], 1)
    groups = _grid_shape(params, shape)[1]
    spare = groups * params.group - shape[1]
    codes = unpack_bits(tensors["qweight"], params.bits, shape[1])
    codes = torch.nn.functional.pad(codes, (0, spare)) if spare else codes
    if params.symmetric:
        codes += _code_range(params)[0] % 256  # never the stored tensor: fewer than 8 bits are unpacked into a new one
        units = codes.view(torch.int8).reshape(shape[0], groups, -1)
    else:
        zero = unpack_bits(tensors["zero"], params.bits, groups)
        units = codes.reshape(shape[0], groups, -1).sub_(zero.unsqueeze(-1)).view(torch.int8)
    units = units.mul_(_scales.numbers(tensors, groups).view(torch.int8).unsqueeze(-1))
    return units.reshape(shape[0], -1)[:, : shape[1]], tensors["row_scale"].float()
