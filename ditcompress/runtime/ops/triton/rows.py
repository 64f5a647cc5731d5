"""Tokens to 8-bit codes in one pass over memory: residual update, norm, modulation, activation, rotation, rounding.

One program holds whole rows in registers, reads the input once and writes codes and a float32 scale a row. Grids are
those of `runtime/activation.py`. Everything is float32 in between, where layers one by one would round to the
model's dtype after each. Codes equal those of the torch functions except where x / scale is within about 2**-15 of a
tie (rounding of the reciprocal; 1e-4 of the codes are off by one) and, with a rotation, 2**-9 (see `_rotation`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...activation import TINY
from . import _rotation
from ._common import ACTIVATIONS, LARGEST_ROW, OPERAND, activate, power_of_two, round_even, stored

E4M3 = "e4m3"
_TOP_E4M3 = 448.0


@dataclass(frozen=True)
class Quantized:
    """`codes` (M, K) int8 or float8_e4m3fn, `scale` (M, 1), `zero` (M, 1) or None: x ~ scale * (codes - zero), both
    float32. `down` (M, R) float32 or None; `residual` (M, K) or None: the updated residual stream."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    down: Tensor | None = None
    residual: Tensor | None = None


@triton.jit
def _normed(x: tl.tensor, real: tl.tensor, K: tl.tensor, eps: tl.tensor, NORM: tl.constexpr) -> tl.tensor:
    if NORM == "layer":
        x = tl.where(real, x - (tl.sum(x, 1) / K)[:, None], 0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    elif NORM == "rms":
        x = x * tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    return x


@triton.jit
def _rounded(
    x: tl.tensor, TOP: tl.constexpr, HALF: tl.constexpr, GRID: tl.constexpr, SMALLEST: tl.constexpr
) -> tl.tensor:
    """Codes (float32), scale and zero of rows (R, places); places beyond the row are 0, which every range holds."""
    if GRID == "asymmetric":
        low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
        scale = tl.maximum(tl.div_rn(high - low, TOP), SMALLEST)
        zero = round_even(tl.div_rn(-low, scale))
        codes = round_even(x * (1.0 / scale)[:, None]) + zero[:, None]
        codes = tl.minimum(tl.maximum(codes, 0.0), TOP) - HALF
        zero -= HALF
    else:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), TOP), SMALLEST)
        zero = scale
        codes = x * (1.0 / scale)[:, None]
        if GRID == "symmetric":
            codes = round_even(codes)
        codes = tl.minimum(tl.maximum(codes, -TOP), TOP)
    return codes, scale, zero


@triton.jit
def _project(
    x: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    real: tl.tensor,
    RANK: tl.constexpr,
) -> None:
    """out (M, RANK) = x down^T in float32, one rank at a time: `down` comes from the cache."""
    for r in range(RANK):
        d = tl.load(down + r * K + column, mask=real, other=0.0).to(tl.float32)
        tl.store(out + row * RANK + r, tl.sum(x * d, 1)[:, None], mask=row < M)


@triton.jit
def _rows(
    x_in: tl.tensor,
    codes_out: tl.tensor,
    scale_out: tl.tensor,
    zero_out: tl.tensor,
    residual: tl.tensor,
    gate: tl.tensor,
    residual_out: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    smooth: tl.tensor,
    sign: tl.tensor,
    h: tl.tensor,
    down: tl.tensor,
    down_out: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    T: tl.tensor,
    eps: tl.tensor,
    h_norm: tl.tensor,
    NORM: tl.constexpr,
    ONE: tl.constexpr,
    ACT: tl.constexpr,
    GRID: tl.constexpr,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    SMALLEST: tl.constexpr,
    RANK: tl.constexpr,
    FLOAT_DOWN: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    REST: tl.constexpr,
    PAD: tl.constexpr,
    D0: tl.constexpr,
    C0: tl.constexpr,
    D1: tl.constexpr,
    C1: tl.constexpr,
    D2: tl.constexpr,
    C2: tl.constexpr,
    D3: tl.constexpr,
    C3: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place = tl.arange(0, PLACES)[None, :]
    if PAD > 1:
        column = place // PAD * REST + place % PAD
        real = (row < M) & (place % PAD < REST) & (column < K)
    else:
        column = place
        real = (row < M) & (column < K)
    here, there = row * K + column, row // T * K + column  # of the token, of its sample
    x = tl.load(x_in + here, mask=real, other=0.0).to(tl.float32)
    if residual is not None:
        if gate is not None:
            x = x * tl.load(gate + there, mask=real, other=0.0).to(tl.float32)
        x += tl.load(residual + here, mask=real, other=0.0).to(tl.float32)
        tl.store(residual_out + here, x.to(residual_out.dtype.element_ty), mask=real)
        x = x.to(residual_out.dtype.element_ty).to(tl.float32)  # what the next layer will read
    x = _normed(x, real, K, eps, NORM)
    if scale is not None:
        x = x * (ONE + tl.load(scale + there, mask=real, other=0.0).to(tl.float32))
    if shift is not None:
        x += tl.load(shift + there, mask=real, other=0.0).to(tl.float32)
    x = activate(x, ACT)
    if smooth is not None:
        x = tl.div_rn(x, tl.load(smooth + column, mask=real, other=1.0).to(tl.float32))
    if sign is not None:
        x = x * tl.load(sign + column, mask=real, other=0.0).to(tl.float32)
    if D0 > 0:
        x = _rotation.apply(x, h, ROWS, PLACES, D0, C0, D1, C1, D2, C2, D3, C3, DOT) * h_norm
    codes, step, zero = _rounded(x, TOP, HALF, GRID, SMALLEST)
    tl.store(codes_out + here, stored(codes, codes_out.dtype.element_ty), mask=real)
    tl.store(scale_out + row, step[:, None], mask=row < M)
    if GRID == "asymmetric":
        tl.store(zero_out + row, zero[:, None], mask=row < M)
    if RANK > 0 and FLOAT_DOWN:
        _project(x, down, down_out, row, column, M, K, real, RANK)


@triton.jit
def _down_of_codes(
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """scale * (codes - zero) times down^T: integers of up to 9 bits are exact in bfloat16, `down` is bfloat16."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside, r, k = row < M, tl.arange(0, RP), tl.arange(0, BK)
    start = row.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, RP), tl.float32)
    offset = tl.zeros((BM,), tl.float32)
    if zero is not None:
        offset = tl.load(zero + row, mask=inside, other=0.0)
    for first in range(0, K, BK):
        here = inside[:, None] & (first + k < K)[None, :]
        q = tl.load(codes + start + first + k[None, :], mask=here, other=0.0).to(tl.float32)
        if zero is not None:
            q = tl.where(here, q - offset[:, None], 0.0)
        d = tl.load(down + r[None, :] * K + first + k[:, None], mask=(r < RANK)[None, :] & (first + k < K)[:, None])
        acc = tl.dot(q.to(DOT), d.to(DOT), acc)
    acc *= tl.load(scale + row, mask=inside, other=0.0)[:, None]
    tl.store(out + row[:, None] * RANK + r[None, :], acc, mask=inside[:, None] & (r < RANK)[None, :])


def _grid(bits: int, symmetric: bool, element: str) -> tuple[str, float, float]:
    """(kind, largest code, what is subtracted so that codes fit int8)."""
    if element == E4M3:
        return E4M3, _TOP_E4M3, 0.0
    if element != "int" or not 2 <= bits <= 8:
        raise ValueError(f"no kernel for {element} of {bits} bits")
    if symmetric:
        return "symmetric", float(2 ** (bits - 1) - 1), 0.0
    return "asymmetric", float(2**bits - 1), float(2 ** (bits - 1))


def supported(width: int, rotate: int, device: torch.device) -> bool:
    """Whether rows of `width` with a transform of order `rotate` (0: none) fit the kernel."""
    return power_of_two(width) <= LARGEST_ROW and _rotation.plan(width, rotate, device) is not None


def down_of_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, down: Tensor) -> Tensor:
    """scale * (codes - zero) @ down^T, float32 (M, R); codes (M, K) int8 or E4M3, down (R, K) bfloat16."""
    rows, width = codes.shape
    rank = down.shape[0]
    out = torch.empty(rows, rank, dtype=torch.float32, device=codes.device)
    size = max(16, power_of_two(rank))
    block = 64 if rows >= 4096 else 32
    _down_of_codes[(triton.cdiv(rows, block),)](
        codes, scale, zero, down.contiguous(), out, rows, width, rank, size, block, 128, OPERAND,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def quantize_rows(
    x: Tensor,
    *,
    norm: str | None = None,
    eps: float = 1e-6,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str | None = None,
    smooth: Tensor | None = None,
    sign: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    down_of: str = "rounded",
    bits: int = 8,
    symmetric: bool = True,
    element: str = "int",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    one: float = 1.0,
) -> Quantized:
    """Codes of x (..., K) as rows (M, K), in this order: residual + gate * x, norm ("layer", "rms"; no weights),
    * (one + scale) + shift, activation, / smooth, * sign, Hadamard transform of order `rotate`, rounding.

    shift, scale, gate: (B, K), for M / B consecutive rows each. smooth, sign: (K,). down: (R, K), of the "rounded"
    or the "float" input that it meets after the transform. ValueError for what `supported` denies.
    """
    width = x.shape[-1]
    x = x.reshape(-1, width).contiguous()
    rows = x.shape[0]
    kind, top, half = _grid(bits, symmetric, element)
    plan = _rotation.plan(width, rotate, x.device)
    if plan is None or plan.places > LARGEST_ROW or activation not in ACTIVATIONS or norm not in (None, "layer", "rms"):
        raise ValueError(f"no kernel for rows of {width}, norm {norm}, activation {activation}, transform {rotate}")
    samples = {t.shape[0] for t in (shift, scale, gate) if t is not None} or {1}
    if len(samples) > 1 or rows % min(samples):
        raise ValueError(f"{rows} rows are not those of {sorted(samples)} samples")
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn if kind == E4M3 else torch.int8)
    step = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    zero = torch.empty_like(step) if kind == "asymmetric" else None
    updated = None if residual is None else torch.empty_like(residual).reshape(-1, width)
    rank = 0 if down is None or down_of != "float" else down.shape[0]
    projected = torch.empty(rows, rank, dtype=torch.float32, device=x.device) if rank else None
    count = max(1, min(4, 2048 // plan.places))
    vectors = [None if t is None else t.contiguous() for t in (shift, scale, smooth, sign)]
    if rows:
        _rows[(triton.cdiv(rows, count),)](
            x, codes, step, zero,
            None if residual is None else residual.reshape(-1, width).contiguous(),
            None if gate is None else gate.contiguous(), updated, *vectors, plan.matrices,
            None if down is None else down.contiguous(), projected,
            rows, width, max(rows // min(samples), 1), eps, plan.norm,
            norm, one, activation, kind, top, half, TINY, rank, down_of == "float",
            count, plan.places, plan.rest, plan.pad, *(n for i in range(4) for n in plan.step(i)), OPERAND,
            num_warps=min(16, max(4, count * plan.places // 512)),
        )  # fmt: skip
    if down is not None and down_of == "rounded":
        projected = down_of_codes(codes, step, zero, down)
    return Quantized(codes, step, zero, projected, updated)
