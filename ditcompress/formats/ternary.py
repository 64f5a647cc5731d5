"""Ternary weights: value = scale * code, code -1, 0 or 1.

`absmean` (BitNet b1.58, Ma et al. 2024; TerDiT, Lu et al. 2024): scale = mean |w| of the group, code = w / scale
rounded and clamped. `least_squares` goes on from there, alternating the nearest codes and the scale that fits them.
Packed in 2 bits, or five codes in a byte (`base3`, 1.6 bits; 3**5 = 243). Shapes: N rows (out), K columns (in),
G groups of consecutive input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import _scales
from ._bits import pack_bits, packed_width, unpack_bits
from ._scales import Columns, Grid
from .base import StrictParams

_ROUNDS = 20  # of least squares; it settles in about ten
_PER_BYTE = 5


class Params(StrictParams):
    """One scale per `layout`, found by `fit`, stored as `scale`; codes stored by `packing`."""

    layout: Literal["tensor", "row", "group"] = "row"
    group: int = Field(128, ge=2)
    scale: _scales.ScaleType = "float32"
    fit: Literal["absmean", "least_squares"] = "absmean"
    packing: Literal["bits", "base3"] = "bits"

    @model_validator(mode="after")
    def _two_level_needs_groups(self) -> Params:
        if self.scale == "uint8" and self.layout != "group":
            raise ValueError("scale: uint8 needs layout: group")
        return self


def _nearest(values: Tensor) -> Tensor:
    return torch.round(values).clamp(-1, 1)


def _alternate(groups: Tensor, cost: Tensor, scale: Tensor) -> list[Tensor]:
    """The scale and its successors: each is the least squares fit to the codes of the one before."""
    scales = [scale]
    for _ in range(_ROUNDS):
        codes = _nearest(groups / scales[-1].unsqueeze(-1))
        weight = (cost * codes.square()).sum(-1)
        fitted = (cost * codes * groups).sum(-1) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        scales.append(torch.where(fitted > 0, fitted, scales[-1]))  # all codes zero: nothing to fit
        if torch.equal(scales[-1], scales[-2]):
            break
    return scales


def fit(weight: Tensor, params: Params, importance: Tensor | None = None) -> Grid:
    """The grid of a weight (N, K); `importance` (K,) weights the columns' squared errors in `least_squares`."""
    groups = _scales.grouped(weight, params.layout, params.group)
    members = _scales.costs(weight, None, params.layout, params.group).sum(-1)
    scales = [groups.abs().sum(-1) / members]
    cost = _scales.costs(weight, importance, params.layout, params.group)
    smallest = _scales.SMALLEST[params.scale]
    if params.fit == "least_squares":
        scales = _alternate(groups, cost, scales[0].clamp_min(smallest))
    row = _scales.row_scales(torch.stack(scales).amax(0), params.scale)
    stored = [_scales.rounded(scale.clamp_min(smallest), params.scale, row) for scale in scales]
    if len(stored) == 1:
        return Grid(stored[0], row)

    def decode(values: Tensor, candidate: tuple[Tensor, ...]) -> Tensor:
        scale = candidate[0].unsqueeze(-1)
        return _nearest(values / scale) * scale

    return Grid(_scales.least_error(groups, cost, ((scale,) for scale in stored), decode)[0], row)


def _scale(grid: Grid, params: Params, shape: tuple[int, int], columns: Columns | None) -> Tensor:
    where = _scales.whole(shape[1], columns)
    return _scales.expand(grid.scale, params.layout, params.group, shape, where)


def code(
    weight: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Codes -1, 0, 1, int32. With `columns`, `weight` holds only those columns of a matrix of `shape`."""
    shape = shape or (weight.shape[0], weight.shape[1])
    return _nearest(weight / _scale(grid, params, shape, columns)).to(torch.int32)


def value(
    codes: Tensor, grid: Grid, params: Params, shape: tuple[int, int] | None = None, columns: Columns | None = None
) -> Tensor:
    """Float32 values of codes (N, K), or of some `columns` of a matrix of `shape`."""
    shape = shape or (codes.shape[0], codes.shape[1])
    return codes * _scale(grid, params, shape, columns)


def _pack_base3(digits: Tensor) -> Tensor:
    """Digits 0, 1, 2 (N, K) to uint8 (N, ceil(K / 5)), the first digit lowest; a short last byte ends in zeros."""
    padded = torch.nn.functional.pad(digits, (0, -digits.shape[1] % _PER_BYTE))
    powers = 3 ** torch.arange(_PER_BYTE, device=digits.device)
    return (padded.reshape(len(digits), -1, _PER_BYTE) * powers).sum(-1).to(torch.uint8)


def _unpack_base3(packed: Tensor, columns: int) -> Tensor:
    powers = 3 ** torch.arange(_PER_BYTE, device=packed.device)
    return (packed.unsqueeze(-1).long() // powers % 3).reshape(len(packed), -1)[:, :columns]


def layout(params: Params, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors."""
    width = -(-shape[1] // _PER_BYTE) if params.packing == "base3" else packed_width(shape[1], 2)
    grid = _scales.grid_shape(params.layout, params.group, shape)
    return {"qweight": ((shape[0], width), torch.uint8), **_scales.declare(params.scale, grid)}


def pack(codes: Tensor, grid: Grid, params: Params) -> dict[str, Tensor]:
    """The stored tensors, as `layout` declares them; a code is stored as code + 1."""
    packed = _pack_base3(codes + 1) if params.packing == "base3" else pack_bits(codes + 1, 2)
    scales = _scales.store(grid.scale, grid.row_scale, params.scale)
    return {name: tensor.contiguous() for name, tensor in {"qweight": packed, **scales}.items()}


def unpack(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """Codes (int32) and grid from the stored tensors."""
    packed = tensors["qweight"]
    stored = _unpack_base3(packed, shape[1]) if params.packing == "base3" else unpack_bits(packed, 2, shape[1])
    return stored.to(torch.int32) - 1, _scales.load(tensors, params.scale)


def is_int8(params: Params) -> bool:
    """Whether `as_int8` can be asked for: not with scales for groups."""
    return params.layout != "group"


def as_int8(tensors: Mapping[str, Tensor], params: Params, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The weight as INT8 (N, K) times a float32 scale a row (N, 1), exactly."""
    packed = tensors["qweight"]
    stored = _unpack_base3(packed, shape[1]) if params.packing == "base3" else unpack_bits(packed, 2, shape[1])
    return stored.to(torch.int8) - 1, tensors["scale"].float().expand(shape[0], 1)
