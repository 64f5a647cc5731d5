"""Packed weights to a matrix that an 8-bit product reads, in one pass over memory; or to plain floating point.

Per row the result has one scale. It is exact where the units of a row share a step and fit (`row` and `tensor` layouts
of integers, ternary and most small floats), and for MX elements in E4M3, whose block exponents are folded into the
codes as long as those of a row span at most 14 binades (e2m1). Everything else is rounded once more, to the row's grid.
What that costs, in dB of the weight's SQNR (normal | Student-t, 5 degrees of freedom; K = 1152):

    INT8: int2..int4 groups, NF4, FP4, MXFP4 0.1 | 0.1; int5 0.1 | 0.3; int6 0.6 | 1.2; e2m3 groups 0.4 | 1.4;
          int8 groups of 64 4.3 | 6.3; asymmetric int8 rows 3.3 | 3.7
    E4M3: int2, int3 0.1; int4, NF4, FP4 0.3; int5 1.3 | 0.9; int6 4.0 | 2.9; int8 11 to 13 (its own limit is 31 dB)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....plan import WeightSpec
from ...activation import TINY
from . import FORMATS
from ._common import LARGEST_ROW, round_even, stored
from ._packed import Packed, decoded, describe, width_of

_TOP_INT8, _TOP_E4M3 = 127.0, 448.0


@triton.jit
def _decode(
    out: tl.tensor,
    scale_out: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    row_scale: tl.tensor,
    zero: tl.tensor,
    table: tl.tensor,
    stride: tl.tensor,
    grid_rows: tl.tensor,
    grid_columns: tl.tensor,
    zero_stride: tl.tensor,
    BITS: tl.constexpr,
    PACKING: tl.constexpr,
    LOWEST: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    DIM: tl.constexpr,
    book_rows: tl.tensor,
    ENTRIES: tl.constexpr,
    N: tl.tensor,
    K: tl.tensor,
    MODE: tl.constexpr,
    TOP: tl.constexpr,
    FACTOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    first = tl.program_id(1) * W
    units, step = decoded(
        q, scale, row_scale, zero, table, stride, grid_rows, grid_columns, zero_stride, BITS, PACKING, LOWEST, LAYOUT,
        GROUP, SCALES, ZERO_BITS, DIM, book_rows, ENTRIES, row, first, N, K, R, W,
    )  # fmt: skip
    column = first + tl.arange(0, W)[None, :]
    inside = (row < N) & (column < K)
    if MODE == "float":
        values = units * step
    elif MODE == "exact":
        values = units * FACTOR
        tl.store(scale_out + row, step * (1.0 / FACTOR), mask=row < N)
    else:
        if MODE == "powers":  # the largest power of two of the row, times one that uses the grid's range
            largest = tl.max(tl.where(inside, step, 0.0), 1)[:, None] * FACTOR
            values = units * (step * tl.div_rn(1.0 + tl.zeros_like(largest), tl.maximum(largest, SMALLEST)))
        else:
            values = units * step
            largest = tl.div_rn(tl.max(tl.abs(values), 1), TOP)[:, None]
            values = values * (1.0 / tl.maximum(largest, SMALLEST))
        tl.store(scale_out + row, tl.maximum(largest, SMALLEST), mask=row < N)
        if INTEGER:
            values = round_even(values)
        values = tl.minimum(tl.maximum(values, -TOP), TOP)
    here = row.to(tl.int64) * K + column
    tl.store(out + here, stored(values, out.dtype.element_ty), mask=inside)


def _launch(packed: Packed, out: Tensor, scale: Tensor | None, mode: str, top: float, factor: float) -> None:
    rows, columns = packed.shape
    width = width_of(packed, LARGEST_ROW if mode != "float" else 2048)
    count = max(1, 2048 // width)
    smallest = 2.0**-100 if mode == "powers" else TINY
    _decode[(triton.cdiv(rows, count), triton.cdiv(columns, width))](
        out, scale, *packed.arguments(), rows, columns, mode, top, factor, smallest, out.dtype == torch.int8,
        count, width, num_warps=min(16, max(4, count * width // 512)),
    )  # fmt: skip


def _describe(spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed:
    packed = describe(spec, tensors, shape)
    if packed is None or shape[1] > LARGEST_ROW:
        raise ValueError(f"no kernel decodes {spec.format} of {shape}")
    return packed


def supported(spec: WeightSpec, shape: tuple[int, int]) -> bool:
    """Whether weights of this format and shape are decoded here."""
    return spec.format in FORMATS and shape[1] <= LARGEST_ROW


def decode_int8(spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """INT8 codes (N, K) within +-127 (a symmetric 2-bit grid: -2 too) and float32 scales (N, 1).

    ValueError where `supported` says no.
    """
    packed = _describe(spec, tensors, shape)
    out = torch.empty(shape, dtype=torch.int8, device=packed.codes.device)
    scale = torch.empty(shape[0], 1, dtype=torch.float32, device=out.device)
    if packed.one_step and packed.exact:
        _launch(packed, out, scale, "exact", _TOP_INT8, packed.exact)
    else:
        _launch(packed, out, scale, "rounded", _TOP_INT8, 1.0)
    return out, scale


def decode_e4m3(spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """E4M3 codes (N, K), float8_e4m3fn, and float32 scales (N, 1). ValueError where `supported` says no."""
    packed = _describe(spec, tensors, shape)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=packed.codes.device)
    scale = torch.empty(shape[0], 1, dtype=torch.float32, device=out.device)
    if packed.scales == "e8m0":
        spare = math.floor(math.log2(_TOP_E4M3 / packed.largest))
        _launch(packed, out, scale, "powers", _TOP_E4M3, 2.0**-spare)
    elif packed.one_step and _fits_e4m3(packed):
        _launch(packed, out, scale, "exact", _TOP_E4M3, 1.0)
    else:
        _launch(packed, out, scale, "rounded", _TOP_E4M3, 1.0)
    return out, scale


def _fits_e4m3(packed: Packed) -> bool:
    """Whether every unit is an E4M3 number: whole numbers up to 16, and small floats but the wide ones."""
    if packed.table is None:
        return packed.exact > 0 and packed.largest <= 16
    return packed.largest <= _TOP_E4M3


def decode_float(
    spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight (N, K) in a floating-point dtype. ValueError where `supported` says no."""
    packed = _describe(spec, tensors, shape)
    out = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    _launch(packed, out, None, "float", 1.0, 1.0)
    return out
