"""Packed weights times a few rows: y = act(x) W^T + bias for M <= 64, where reading the weight takes all the time.

adaLN linears have one row an image: in 4 bits they are read in a quarter of the time of bfloat16. The weight is decoded
in registers, rounded to the dtype of x as the reference does, multiplied on the tensor cores and summed in float32 over
the whole of K by one program, so results do not depend on the number of programs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....plan import WeightSpec
from . import FORMATS, interpreted
from ._common import ACTIVATIONS, activate, power_of_two
from ._packed import decoded, describe

MOST_ROWS = 64


@triton.jit
def _few_rows(
    x: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
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
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    ACT_IN: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    m = tl.arange(0, BM)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        units, step = decoded(
            q, scale, row_scale, zero, table, stride, grid_rows, grid_columns, zero_stride, BITS, PACKING, LOWEST,
            LAYOUT, GROUP, SCALES, ZERO_BITS, DIM, book_rows, ENTRIES, row[:, None], first, N, K, BN, BK,
        )  # fmt: skip
        column = first + k
        v = tl.load(x + m[:, None] * K + column[None, :], mask=(m < M)[:, None] & (column < K)[None, :], other=0.0)
        if ACT_IN is not None:
            v = activate(v.to(tl.float32), ACT_IN).to(x.dtype.element_ty)
        w = (units * step).to(x.dtype.element_ty)
        if WIDEN:
            v, w = v.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(v, tl.trans(w), acc, input_precision="ieee")
    real = row < N
    if bias is not None:
        acc += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + row[None, :], acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & real[None, :]
    )  # fmt: skip


def supported(spec: WeightSpec, rows: int) -> bool:
    """Whether a weight of this format is multiplied with so many rows here."""
    return rows <= MOST_ROWS and spec.format in FORMATS


def product(
    x: Tensor,
    spec: WeightSpec,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(x) W^T + bias for x (..., K) of at most 64 rows and a stored W (N, K): (..., N) in the dtype of x.

    The activation is that of the input, as adaLN has it (SiLU). ValueError for what `supported` denies.
    """
    packed = describe(spec, tensors, shape)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows = flat.shape[0]
    if packed is None or rows > MOST_ROWS or activation not in ACTIVATIONS or flat.shape[1] != shape[1]:
        raise ValueError(f"no kernel for {rows} rows of {flat.shape[1]} times {spec.format} {shape}, {activation}")
    out = torch.empty(rows, shape[0], dtype=x.dtype, device=x.device)
    size, depth = max(16, power_of_two(rows)), 64 if interpreted() else 256
    if rows:
        _few_rows[(triton.cdiv(shape[0], 16),)](
            flat, bias, out, *packed.arguments(), rows, *shape, activation, interpreted(), size, 16, depth,
            num_warps=4, num_stages=4,
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], shape[0])
