"""What several kernels share: rounding, activations, the smallest scale."""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreted

ACTIVATIONS = (None, "gelu_tanh", "gelu", "silu")
LARGEST_ROW = 16384  # columns of a row that one program holds in registers


# Triton's interpreter multiplies the bit patterns of bfloat16, so there the operands of products are widened (exactly).
OPERAND = tl.float32 if interpreted() else tl.bfloat16
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """Nearest integers, ties to even, of float32 below 2**22 in magnitude: the sum has no bits left for fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def activate(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """GELU (exact or by tanh) or SiLU of float32; tanh is taken from the sigmoid of twice its argument."""
    if ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def stored(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 in the dtype of a result. A GPU rounds E4M3 to even; the interpreter cuts it off and loses carries, so
    there the value is rounded first."""
    if _INTERPRETED and tl.float8e4nv == DTYPE:
        pattern = x.to(tl.int32, bitcast=True)
        normal = ((pattern + 0x7FFFF + ((pattern >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
    return x.to(DTYPE)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
