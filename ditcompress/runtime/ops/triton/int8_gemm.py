"""INT8 tokens times INT8 weights with all that follows in one launch: scales, zero points, bias, low rank, activation,
gated residual.

y = act(scale * (codes - zero) @ (weight * weight scale)^T + bias + down @ up^T), then residual + gate * y. Sums are
exact int32; the rest is float32, the low-rank product TF32 (10 bits of `down`). Programs stay on their multiprocessor
and take tiles in an order that keeps a few columns of weights in the cache. Both operands are stored with K last, as
the 8-bit wgmma instructions want them. Loads are plain (cp.async), or descriptors where a tile says so (`tma`: one
weight, K a multiple of 16, Hopper and later). Splitting K is left out: tiles that fit the shape leave few waves idle,
and it would cost a second pass over the result.

`grouped` multiplies two token streams by a weight each in one launch (FLUX: 512 text rows alone fill a third of an
H200): the rows of both lie in one matrix, those of the first stream first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import interpreted, processors, tiles
from ._common import ACTIVATIONS, activate, power_of_two

MOST_RANK = 128


@dataclass(frozen=True)
class Weight:
    """codes (N, K) int8, scale (N, 1) float32; `row_sum` (N,) float32 of the codes, needed with zero points; `bias`
    (N,); `up` (N, R) of the low-rank part."""

    codes: Tensor
    scale: Tensor
    row_sum: Tensor | None = None
    bias: Tensor | None = None
    up: Tensor | None = None


@triton.jit
def _tile(index: tl.tensor, rows: tl.tensor, columns: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Row and column of a tile: down GROUP rows, then on to the next column."""
    width = GROUP * columns
    first = index // width * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + index % width % size, index % width // size


@triton.jit
def _sums(
    a: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    K: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """int32 (BM, BN) of rows of a times rows of b, both pointers to the first element."""
    k = tl.arange(0, BK)
    pa = a + row[:, None] * K + k[None, :]
    pb = b + column[None, :] * K + k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for first in range(0, K, BK):
        if EVEN:
            x, w = tl.load(pa), tl.load(pb)
        else:
            inside = first + k < K
            x, w = tl.load(pa, mask=inside[None, :], other=0), tl.load(pb, mask=inside[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        pa += BK
        pb += BK
    return acc


@triton.jit
def _sums_by_descriptor(
    a: tl.tensor, b: tl.tensor, top: tl.tensor, left: tl.tensor, K: tl.tensor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`_sums` of tensor descriptors, which read zeros beyond the matrix."""
    acc = tl.zeros((BM, BN), tl.int32)
    for first in range(0, K, BK):
        acc = tl.dot(a.load([top, first]), b.load([left, first]).T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _finish(
    acc: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    N: tl.tensor,
    out: tl.tensor,
    sa: tl.tensor,
    za: tl.tensor,
    sw: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    residual: tl.tensor,
    gate: tl.tensor,
    ACT: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Everything after the sums of the tile at (top, left) of a stream whose rows begin at `start`, by halves of
    tiles wider than WIDTH (64 numbers a thread)."""
    if BN > WIDTH:
        one, two = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _finish(
            one, top, left, start, count, tokens, N, out, sa, za, sw, sums, bias, down, up, residual, gate,
            ACT, RANK, RP, BM, BN // 2, WIDTH,
        )  # fmt: skip
        _finish(
            two, top, left + BN // 2, start, count, tokens, N, out, sa, za, sw, sums, bias, down, up, residual, gate,
            ACT, RANK, RP, BM, BN // 2, WIDTH,
        )  # fmt: skip
    else:
        row, column = tl.arange(0, BM), left + tl.arange(0, BN)
        real, exists = row < count - top, column < N
        inside = real[:, None] & exists[None, :]
        y = acc.to(tl.float32)
        tokens_at = start + top + row
        if za is not None:
            y -= tl.load(za + tokens_at, mask=real)[:, None] * tl.load(sums + column, mask=exists)[None, :]
        y = y * tl.load(sa + tokens_at, mask=real)[:, None] * tl.load(sw + column, mask=exists)[None, :]
        if RANK > 0:
            r = tl.arange(0, RP)
            have = (r < RANK)[None, :]
            d = tl.load(down + tokens_at[:, None] * RANK + r[None, :], mask=real[:, None] & have, other=0.0)
            u = tl.load(up + column[:, None] * RANK + r[None, :], mask=exists[:, None] & have, other=0.0)
            y = tl.dot(d.to(tl.float32), tl.trans(u.to(tl.float32)), y, input_precision="tf32")
        if bias is not None:
            y += tl.load(bias + column, mask=exists).to(tl.float32)[None, :]
        y = activate(y, ACT)
        first = (start + top).to(tl.int64) * N
        here = row[:, None] * N + column[None, :]
        if residual is not None:
            if gate is not None:
                there = ((top + row) // tokens)[:, None] * N + column[None, :]
                y = y * tl.load(gate + there, mask=inside).to(tl.float32)
            y += tl.load(residual + first + here, mask=inside).to(tl.float32)
        tl.store(out + first + here, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    a: tl.tensor,
    sa: tl.tensor,
    za: tl.tensor,
    down: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    b0: tl.tensor,
    sw0: tl.tensor,
    sums0: tl.tensor,
    bias0: tl.tensor,
    up0: tl.tensor,
    gate0: tl.tensor,
    b1: tl.tensor,
    sw1: tl.tensor,
    sums1: tl.tensor,
    bias1: tl.tensor,
    up1: tl.tensor,
    gate1: tl.tensor,
    M0: tl.tensor,
    M1: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    T0: tl.tensor,
    T1: tl.tensor,
    ACT: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    columns, rows0 = tl.cdiv(N, BN), tl.cdiv(M0, BM)
    rows = rows0
    if b1 is not None:
        rows += tl.cdiv(M1, BM)
    for index in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        m, n = _tile(index, rows, columns, GROUP)
        start, count, tokens = 0, M0, T0
        b, sw, sums, bias, up, gate = b0, sw0, sums0, bias0, up0, gate0
        if b1 is not None:  # pointers are chosen, not branches taken: one copy of the code
            later = m >= rows0
            m -= tl.where(later, rows0, 0)
            start, count, tokens = tl.where(later, M0, 0), tl.where(later, M1, M0), tl.where(later, T1, T0)
            b, sw = tl.where(later, b1, b0), tl.where(later, sw1, sw0)
            if sums0 is not None:
                sums = tl.where(later, sums1, sums0)
            if bias0 is not None:
                bias = tl.where(later, bias1, bias0)
            if up0 is not None:
                up = tl.where(later, up1, up0)
            if gate0 is not None:
                gate = tl.where(later, gate1, gate0)
        if TMA:
            acc = _sums_by_descriptor(a, b, m * BM, n * BN, K, BM, BN, BK)
        else:  # 64 bits for where the tile begins, 32 within it: registers are what the large tiles are short of
            row, column = tl.arange(0, BM), tl.arange(0, BN)
            row, column = tl.where(row < count - m * BM, row, 0), tl.where(column < N - n * BN, column, 0)
            first, left = (start + m * BM).to(tl.int64), (n * BN).to(tl.int64)
            acc = _sums(a + first * K, b + left * K, row, column, K, BM, BN, BK, EVEN)
        _finish(
            acc, m * BM, n * BN, start, count, tokens, N, out, sa, za, sw, sums, bias, down, up, residual, gate,
            ACT, RANK, RP, BM, BN, WIDTH,
        )  # fmt: skip


def _descriptors(codes: Tensor, weights: int) -> bool:
    """Whether the copy engine can read these operands."""
    hopper = codes.device.type != "cuda" or torch.cuda.get_device_capability(codes.device) >= (9, 0)
    return hopper and weights == 1 and codes.shape[1] % 16 == 0


def _check(codes: Tensor, weights: tuple[Weight, ...], rows: tuple[int, ...], zero: Tensor | None) -> None:
    """ValueError for what the kernel would read out of bounds."""
    shape = weights[0].codes.shape
    if any(w.codes.shape != shape for w in weights) or codes.shape[1] != shape[1] or sum(rows) != codes.shape[0]:
        raise ValueError(f"{tuple(codes.shape)} times {[tuple(w.codes.shape) for w in weights]}: shapes do not fit")
    for name in ("row_sum", "bias", "up"):
        if len({getattr(w, name) is None for w in weights}) > 1:
            raise ValueError(f"only one of two weights has {name}")
    if zero is not None and weights[0].row_sum is None:
        raise ValueError("zero points need the row sums of the weight")


def _tokens(rows: int, gate: Tensor) -> int:
    """Rows of a sample."""
    samples = gate.shape[0]
    if rows % samples:
        raise ValueError(f"{rows} rows are not those of {samples} samples")
    return max(rows // samples, 1)


def grouped(
    codes: Tensor,
    scale: Tensor,
    weights: tuple[Weight, ...],
    rows: tuple[int, ...],
    *,
    zero: Tensor | None = None,
    down: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gates: tuple[Tensor, ...] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """One or two products in one launch: (sum of rows, N) in `dtype`.

    codes (M, K) int8, scale and zero (M, 1), down (M, R) float32, residual (M, N); the first rows[0] of all belong to
    weights[0], the others to weights[1]. gates: (B, N) for each weight, of rows / B consecutive rows a sample.
    """
    _check(codes, weights, rows, zero)
    if activation not in ACTIVATIONS or (down is None) != (weights[0].up is None):
        raise ValueError(f"activation {activation}, or only half of a low-rank part")
    columns, depth = weights[0].codes.shape
    rank = 0 if down is None else down.shape[1]
    if rank > MOST_RANK:
        raise ValueError(f"rank {rank} is above {MOST_RANK}")
    out = torch.empty(codes.shape[0], columns, dtype=dtype, device=codes.device)
    count = processors(codes.device)
    tile = tile or (tiles.SMALL if interpreted() else tiles.choose(rows, columns, depth, count))
    total = sum(triton.cdiv(m, tile.m) for m in rows) * triton.cdiv(columns, tile.n)
    if not total:
        return out
    fields: list[Any] = []
    for i in range(2):
        w = weights[i] if i < len(weights) else None
        gate = None if gates is None or w is None else gates[i].contiguous()
        parts = (None,) * 5 if w is None else (w.codes, w.scale, w.row_sum, w.bias, w.up)
        fields += [None if part is None else part.contiguous() for part in parts] + [gate]
    last = rows[1] if len(rows) > 1 else 0
    common = [None if t is None else t.contiguous() for t in (scale, zero, down, residual)]
    codes, tma = codes.contiguous(), tile.tma and _descriptors(codes, len(weights))
    if tma:
        fields[0] = TensorDescriptor.from_tensor(fields[0], [tile.n, tile.k])
        codes = TensorDescriptor.from_tensor(codes, [tile.m, tile.k])
    tokens = [1, 1] if gates is None else [_tokens(m, gate) for m, gate in zip(rows, gates, strict=True)]
    tokens += [1] * (2 - len(tokens))
    _product[(min(total, count * tile.programs),)](
        codes, *common, out, *fields,
        rows[0], last, columns, depth, *tokens, activation, rank, max(16, power_of_two(rank)),
        tile.m, tile.n, tile.k, 8, depth % tile.k == 0, tma,
        2048 * tile.warps // tile.m, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def product(
    codes: Tensor,
    scale: Tensor,
    weight: Weight,
    *,
    zero: Tensor | None = None,
    down: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """`grouped` of one weight: (M, N) in `dtype`; gate (B, N)."""
    gates = None if gate is None else (gate,)
    return grouped(
        codes, scale, (weight,), (codes.shape[0],), zero=zero, down=down, activation=activation, residual=residual,
        gates=gates, dtype=dtype, tile=tile,
    )  # fmt: skip
