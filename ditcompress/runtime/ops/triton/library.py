"""`quantize_rows` and `product` as operators that torch.compile takes for one step: it need not look inside.

`torch.library.custom_op`, which works in Triton's interpreter too; `triton_op`, which lets inductor see the kernel,
does not. In eager mode and CUDA graphs the plain functions have less overhead. An absent result is an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import int8_gemm, rows

_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ditcompress::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `rows.quantize_rows`: (codes, scale, zero, down, residual)."""
    got = rows.quantize_rows(
        x, norm=norm, eps=eps, shift=shift, scale=scale, activation=activation, smooth=smooth, sign=sign, rotate=rotate,
        down=down, down_of=down_of, bits=bits, symmetric=symmetric, element=element, residual=residual, gate=gate,
    )  # fmt: skip
    none = [x.new_empty(0, dtype=torch.float32) if t is None else t for t in (got.zero, got.down)]
    updated = x.new_empty(0) if got.residual is None else got.residual
    return got.codes, got.scale, none[0], none[1], updated


@quantize_rows.register_fake
def _(
    x: Tensor,
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
) -> _Five:
    count, width = x.numel() // x.shape[-1], x.shape[-1]
    integer = element == "int"
    return (
        x.new_empty(count, width, dtype=torch.int8 if integer else torch.float8_e4m3fn),
        x.new_empty(count, 1, dtype=torch.float32),
        x.new_empty((count, 1) if integer and not symmetric else (0,), dtype=torch.float32),
        x.new_empty((0,) if down is None else (count, down.shape[0]), dtype=torch.float32),
        x.new_empty(0) if residual is None else residual.new_empty(count, width),
    )


@torch.library.custom_op("ditcompress::int8_product", mutates_args=())
def product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sum: Tensor | None = None,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    zero: Tensor | None = None,
    down: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See `int8_gemm.product`, the weight in its parts."""
    return int8_gemm.product(
        codes, scale, int8_gemm.Weight(weight, weight_scale, row_sum, bias, up), zero=zero, down=down,
        activation=activation, residual=residual, gate=gate, dtype=dtype,
    )  # fmt: skip


@product.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sum: Tensor | None = None,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    zero: Tensor | None = None,
    down: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)
