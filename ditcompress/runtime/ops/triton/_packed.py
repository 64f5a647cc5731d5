"""Stored weights as the kernels read them: one tile decoder for every format with one code an element, and for vectors.

value = unit * step. A unit is a code (integers, ternary), an entry of a table of all patterns (NF4, small floats) or a
number of a codebook (vectors); the step is the scale of the element's group as it is stored. See the formats for what
the tensors hold.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....formats import _floats, _scales, nf4
from ....formats.base import resolve
from ....plan import WeightSpec
from ._common import power_of_two


@dataclass(frozen=True)
class Packed:
    """A stored weight (N, K) for the kernels.

    packing: "int8" (codes as they are), "bits" (dense, low bits first), "base3" (five ternary digits in a byte).
    `lowest` is added to a code. layout, group: which elements share a scale; rows of the grid for "column_group".
    scales: "float", "two_level" (uint8 times a row's), "e8m0". zero_bits: 0 none, 16 int16, else packed codes.
    table: (2**bits,) float32. dim: columns of a vector, `table` then holds the codebooks (B, C, dim), `book_rows` rows
    to each. exact: a power of two that makes every unit of a row a whole number of at most 127, 0 where there is none.
    """

    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor | None
    row_scale: Tensor | None
    zero: Tensor | None
    table: Tensor | None
    bits: int
    packing: str = "bits"
    lowest: int = 0
    layout: str = "row"
    group: int = 1
    scales: str = "float"
    zero_bits: int = 0
    dim: int = 0
    book_rows: int = 1
    exact: float = 0.0
    largest: float = 0.0  # unit, where a table has one

    @property
    def one_step(self) -> bool:
        """Whether a row has a single scale."""
        return self.layout in ("row", "tensor") and not self.dim

    def arguments(self) -> tuple[Any, ...]:
        """What `units` and `steps` take, in their order."""
        rows = self.scale.shape if self.scale is not None else (1, 1)
        tensors = (self.codes, self.scale, self.row_scale, self.zero, self.table)
        strides = (self.codes.shape[1], rows[0], rows[1], 0 if self.zero is None else self.zero.shape[1])
        entries = 2**self.bits if self.dim else 0
        group = self.group if self.layout == "group" else 1
        return (*tensors, *strides, self.bits, self.packing, self.lowest, self.layout, group, self.scales,
                self.zero_bits, self.dim, self.book_rows, entries)  # fmt: skip


@functools.cache
def _table(kind: str, device: torch.device) -> Tensor:
    """All patterns of an element, float32."""
    with torch.inference_mode(False):
        if kind == "nf4":
            return torch.tensor(nf4.TABLE, device=device)
        count = 2 ** _floats.bits(kind)
        patterns = torch.arange(count).remainder(count // 2).clamp_max(len(_floats.magnitudes(kind)) - 1)
        values = _floats.magnitudes(kind)[patterns]
        return torch.where(torch.arange(count) < count // 2, values, -values).to(device)


@functools.cache
def _whole(kind: str) -> float:
    """The power of two that makes the table whole numbers within int8, 0 where there is none."""
    table = _table(kind, torch.device("cpu"))
    found = [2.0**p for p in range(12) if torch.equal(table * 2**p, torch.round(table * 2**p))]
    return found[0] if found and float(table.abs().max()) * found[0] <= 127 else 0.0


def _integers(tensors: Mapping[str, Tensor], params: Any, common: dict[str, Any]) -> Packed:
    plain = params.bits == 8 and params.symmetric
    lowest = 0
    if params.symmetric and not plain:
        lowest = -(2 ** (params.bits - 1)) + (params.bits > 2)
    zero_bits = 0 if params.symmetric else (params.bits if params.zero == "code" else 16)
    # zeros that are codes keep code - zero within +-(2**bits - 1)
    exact = params.symmetric or (params.bits < 8 and params.zero == "code")
    largest = 2.0 ** (params.bits - 1) if params.symmetric else 2.0**params.bits
    return Packed(
        **common, zero=tensors.get("zero"), table=None, bits=params.bits, packing="int8" if plain else "bits",
        lowest=lowest, layout=params.layout, group=params.group, zero_bits=zero_bits, exact=float(exact),
        largest=largest,
    )  # fmt: skip


def describe(spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed | None:
    """How the kernels read this weight; None for a format that they do not know."""
    _, params = resolve(spec)
    device = tensors["qweight"].device
    two_level = "row_scale" in tensors and spec.format != "vq"
    common: dict[str, Any] = {
        "shape": shape, "codes": tensors["qweight"].contiguous(), "scale": tensors.get("scale"),
        "row_scale": tensors.get("row_scale"), "scales": "two_level" if two_level else "float",
    }  # fmt: skip
    if two_level and params.scale == "uint4":  # a byte each, as the kernels read them: small beside the codes
        groups = _scales.grid_shape(params.layout, params.group, shape)[1]
        common["scale"] = _scales.numbers(tensors, groups)
    if spec.format == "int":
        return _integers(tensors, params, common)
    if spec.format == "ternary":
        base3 = params.packing == "base3"
        return Packed(**common, zero=None, table=None, bits=8 if base3 else 2, packing="base3" if base3 else "bits",
                      lowest=-1, layout=params.layout, group=params.group, exact=1.0, largest=1.0)  # fmt: skip
    if spec.format == "vq":
        return Packed(**common, zero=None, table=tensors["codebook"].contiguous(), bits=params.bits, layout="group",
                      dim=params.dim, book_rows=params.rows or shape[0])  # fmt: skip
    if spec.format == "nf4":
        return Packed(**common, zero=None, table=_table("nf4", device), bits=4, layout="group", group=params.block,
                      largest=1.0)  # fmt: skip
    if spec.format not in ("fp", "mx"):
        return None
    element, mx = params.element, spec.format == "mx"
    common["scales"] = "e8m0" if mx else common["scales"]
    return Packed(
        **common, zero=None, table=_table(element, device), bits=_floats.bits(element),
        layout="group" if mx else params.layout, group=32 if mx else params.group, exact=_whole(element),
        largest=_floats.largest(element),
    )  # fmt: skip


def width_of(packed: Packed, limit: int) -> int:
    """Places of a row in registers: the next power of two, and at least a whole group of those that are one."""
    return min(limit, max(16, power_of_two(packed.shape[1])))


@triton.jit
def _bits_at(base: tl.tensor, index: tl.tensor, mask: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Codes number `index` of a dense row: up to three bytes hold one."""
    first = index * BITS
    byte, shift = first >> 3, first & 7
    found = tl.load(base + byte, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        spills = shift + BITS > 8
        found |= tl.load(base + byte + 1, mask=mask & spills, other=0).to(tl.int32) << 8
    if BITS > 9:
        found |= tl.load(base + byte + 2, mask=mask & (shift + BITS > 16), other=0).to(tl.int32) << 16
    return (found >> shift) & ((1 << BITS) - 1)


@triton.jit
def _codes(
    q: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    PACKING: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """int32 (R, W) of the rows at `row` (R, 1), from column `first`, a multiple of W, on."""
    column = first + tl.arange(0, W)[None, :]
    inside = (row < rows) & (column < columns)
    base = q + row.to(tl.int64) * stride
    if PACKING == "int8":
        codes = tl.load(base + column, mask=inside, other=0).to(tl.int32)
    elif PACKING == "base3":
        byte = tl.load(base + column // 5, mask=inside, other=0).to(tl.int32)
        digit = column % 5
        power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
        codes = byte // power % 3
    elif BITS == 8:
        codes = tl.load(base + column, mask=inside, other=0).to(tl.int32)
    elif BITS == 4:  # whole bytes, in order
        half = first // 2 + tl.arange(0, W // 2)[None, :]
        byte = tl.load(base + half, mask=(row < rows) & (half < stride), other=0)
        codes = tl.reshape(tl.join(byte & 15, byte >> 4), (R, W)).to(tl.int32)
    else:
        codes = _bits_at(base, column, inside, BITS)
    return codes


@triton.jit
def _grid(
    scale: tl.tensor,
    row_scale: tl.tensor,
    zero: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    grid_columns: tl.tensor,
    zero_stride: tl.tensor,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO_BITS: tl.constexpr,
) -> tl.tensor:
    """Step and zero, float32, of the grid's elements at (row, place)."""
    at = row.to(tl.int64) * grid_columns + place
    step = tl.load(scale + at, mask=mask, other=0)
    if SCALES == "e8m0":
        biased = step.to(tl.int32)
        step = tl.where(biased == 0, 1 << 22, biased << 23).to(tl.float32, bitcast=True)
    else:
        step = step.to(tl.float32)
    if SCALES == "two_level":
        step *= tl.load(row_scale + row, mask=mask, other=0.0).to(tl.float32)
    offset = tl.zeros_like(step)
    if ZERO_BITS == 16:
        offset = tl.load(zero + at, mask=mask, other=0).to(tl.float32)
    elif ZERO_BITS > 0:
        base = zero + row.to(tl.int64) * zero_stride
        offset = _bits_at(base, place + tl.zeros_like(row), mask, BITS).to(tl.float32)
    return step, offset


@triton.jit
def _shared(
    scale: tl.tensor,
    row_scale: tl.tensor,
    zero: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    grid_rows: tl.tensor,
    grid_columns: tl.tensor,
    zero_stride: tl.tensor,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """Step and zero of every element (R, W), or broadcastable to it."""
    column = first + tl.arange(0, W)[None, :]
    mask = (row < rows) & (column < columns)
    if LAYOUT == "group" and GROUP <= W and (GROUP & (GROUP - 1)) == 0:  # loaded once a group, then spread
        place = first // GROUP + tl.arange(0, W // GROUP)[None, :]
        mask = (row < rows) & (place < grid_columns)
        step, offset = _grid(
            scale, row_scale, zero, row, place, mask, grid_columns, zero_stride, BITS, SCALES, ZERO_BITS
        )  # fmt: skip
        step = tl.reshape(tl.broadcast_to(step[:, :, None], (R, W // GROUP, GROUP)), (R, W))
        offset = tl.reshape(tl.broadcast_to(offset[:, :, None], (R, W // GROUP, GROUP)), (R, W))
    elif LAYOUT == "group":
        step, offset = _grid(
            scale, row_scale, zero, row, column // GROUP, mask, grid_columns, zero_stride, BITS, SCALES, ZERO_BITS
        )  # fmt: skip
    elif LAYOUT == "column_group":
        step, offset = _grid(
            scale, row_scale, zero, row % grid_rows, column, mask, grid_columns, zero_stride, BITS, SCALES, ZERO_BITS
        )  # fmt: skip
    else:
        at = row % grid_rows  # one row of the grid for a whole tensor
        step, offset = _grid(
            scale, row_scale, zero, at, tl.zeros_like(at), row < rows, grid_columns, zero_stride,
            BITS, SCALES, ZERO_BITS,
        )  # fmt: skip
    return step, offset


@triton.jit
def decoded(
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
    row: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    R: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """Units and steps, float32 and broadcastable to (R, W), of rows `row` (R, 1) from column `first` on; 0 times
    something beyond the matrix."""
    column = first + tl.arange(0, W)[None, :]
    inside = (row < rows) & (column < columns)
    if DIM > 0:
        base = q + row.to(tl.int64) * stride
        code = _bits_at(base, column // DIM, inside, BITS)
        entry = (row // book_rows * ENTRIES + code) * DIM + column % DIM
        units = tl.load(table + entry, mask=inside, other=0.0).to(tl.float32)
        step = tl.full((R, 1), 1.0, tl.float32)
        if row_scale is not None:
            step = tl.load(row_scale + row, mask=row < rows, other=0.0).to(tl.float32)
    else:
        code = _codes(q, row, first, rows, columns, stride, BITS, PACKING, R, W)
        step, offset = _shared(
            scale, row_scale, zero, row, first, rows, columns, grid_rows, grid_columns, zero_stride,
            BITS, LAYOUT, GROUP, SCALES, ZERO_BITS, R, W,
        )  # fmt: skip
        if table is not None:
            units = tl.load(table + code, mask=inside, other=0.0)
        else:
            units = (code + LOWEST).to(tl.float32) - offset
            units = tl.where(inside, units, 0.0)
    return units, step
