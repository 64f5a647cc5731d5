"""INT8 weights (symmetric, one scale a row) times INT8 tokens on CPU: an integer product with exact int32 sums.

`torch._int_mm`, which oneDNN serves. Scales are applied in float32 afterwards; an asymmetric token adds a rank-1 term
with the row sums of the weight codes. Two traps decide where it may be used (measured on torch 2.13, 1 thread):

* Without VNNI instructions oneDNN adds pairs of products in 16 bits, which saturate: outputs are off by 1 to 3 %,
  as much as the quantization itself. So the product is tried on saturating codes before it is trusted.
* Without oneDNN a plain loop does the work: exact, 27 times slower than float32.

oneDNN's prepacked product (`qlinear_pointwise`) is exact too, and faster with AMX (up to 1.6 times), but on a CPU that
has VNNI and no AMX it took seconds where this takes milliseconds, so it is not used.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NAME = "cpu_int8"
# (tokens, in, out): oneDNN picks its kernel by shape; one token and several, whole and ragged tiles
_TRIED = ((1, 64, 16), (5, 67, 19), (64, 256, 64))


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this machine has a fast integer product that adds exactly."""
    return hasattr(torch, "_int_mm") and bool(torch.backends.mkldnn.enabled) and _with_onednn()


@functools.cache
def _with_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and adds_exactly()


def adds_exactly() -> bool:
    """Whether the integer product is right for the codes that overflow 16-bit sums of pairs."""
    for tokens, columns, rows in _TRIED:
        for code in (127, -128):
            codes = torch.full((tokens, columns), code, dtype=torch.int8, device="cpu")
            weight = torch.full((rows, columns), 127, dtype=torch.int8, device="cpu")
            weight[1::2] = -127
            exact = codes.double() @ weight.double().t()
            if not torch.equal(integer_product(codes, weight).double(), exact):
                return False
    return True


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (tokens, in) int8 times weight (out, in) int8, transposed: (tokens, out) int32, exact where `available`."""
    return torch._int_mm(codes.contiguous(), weight.t())


def product(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, weight_scale: Tensor, row_sum: Tensor | None
) -> Tensor:
    """scale * ((codes - zero) @ weight^T) * weight_scale as float32 (..., out).

    codes (..., in) int8; scale, zero (..., 1) float32; weight (out, in) int8; weight_scale (out, 1) float32;
    row_sum (out,) float32 of the weight codes, needed with a zero.
    """
    flat = codes.reshape(-1, codes.shape[-1])
    result = integer_product(flat, weight).reshape(*codes.shape[:-1], -1).float()
    if zero is not None:
        assert row_sum is not None
        result -= zero * row_sum
    return result.mul_(scale).mul_(weight_scale.reshape(-1))
