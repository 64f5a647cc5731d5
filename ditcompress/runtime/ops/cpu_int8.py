"""INT8 weights (symmetric, one scale a row) times INT8 tokens on CPU: an integer product with exact int32 sums.

Two implementations: oneDNN with a prepacked weight where this torch build has it, `torch._int_mm` elsewhere. Both add
exactly in int32; the scales are applied in float32 afterwards. An asymmetric token adds a rank-1 term with the row
sums of the weight codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "cpu_int8"


def available() -> bool:
    """Whether this build has an integer product on CPU."""
    return hasattr(torch, "_int_mm")


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (tokens, in) int8 times weight (out, in) int8, transposed: (tokens, out) int32, exact."""
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
