"""E4M3 tokens times E4M3 weights, a scale for each row of both: `torch._scaled_mm`, which calls cuBLAS or CUTLASS.

There is no Triton in it; it lies here because it takes what `rows` and `decode` make. Without FP8 units (before Hopper,
on a CPU) the same codes are multiplied in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST = (9, 0)  # compute capability: FP8 tensor cores, and scales a row
ALIGNED = 16


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the device multiplies E4M3 with a scale for each row."""
    return (
        device.type == "cuda"
        and hasattr(torch, "_scaled_mm")
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FIRST
    )


def padded(codes: Tensor, rows: bool = False) -> Tensor:
    """Codes with K, and with `rows` N too, brought to a multiple of 16 by zeros: do it once for a weight."""
    down, right = -codes.shape[0] % ALIGNED if rows else 0, -codes.shape[1] % ALIGNED
    if not down and not right:
        return codes.contiguous()
    return F.pad(codes.view(torch.uint8), (0, right, 0, down)).view(codes.dtype)


def reference(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in float32: (M, N) in `dtype`."""
    y = F.linear(codes.float(), weight.float()) * scale * weight_scale.reshape(1, -1)
    return y.to(dtype)


def product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    columns: int = 0,
) -> Tensor:
    """scale * codes (weight * weight_scale)^T + bias: (M, N) in `dtype`.

    codes (M, K) and weight (N, K) float8_e4m3fn; scale (M, 1), weight_scale (N, 1) float32; bias (N,). `columns`: N
    where `weight` and its scale have been padded before (`padded`, with rows), so that it is not done at each call.
    """
    wanted = columns or weight.shape[0]
    if codes.shape[1] < weight.shape[1]:  # a weight that was padded before
        codes = padded(codes)
    if not available(codes.device):
        y = reference(codes, scale, weight, weight_scale, torch.float32)[:, :wanted]
        return (y if bias is None else y + bias.float()).to(dtype)
    codes, weight = padded(codes), padded(weight, rows=True)
    row = F.pad(weight_scale.reshape(1, -1), (0, weight.shape[0] - weight_scale.numel()))
    # with a scale a row the result can only be bfloat16
    y = torch._scaled_mm(codes, weight.t(), scale_a=scale, scale_b=row, out_dtype=torch.bfloat16, use_fast_accum=False)
    y = y[:, :wanted].to(dtype)
    return y if bias is None else y + bias.to(dtype)
