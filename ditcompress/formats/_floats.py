"""Tables of small floating-point elements, and rounding to them.

OCP Microscaling Formats (MX) v1.0, section 5.3, for e2m1, e2m3, e3m2, e4m3 (no infinities, one NaN) and e5m2.
e3m0 (HQ-DiT, Liu et al. 2024) is zero and seven powers of two; e1m2 is the uniform grid 0, 1/4, .. 7/4.

A code is the raw bit pattern: sign, exponent, mantissa. The magnitudes of an element rise with the pattern, so
the index into the table of magnitudes is the pattern without its sign bit.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Element = Literal["e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"]
_FINITE = {"e4m3": 127, "e5m2": 124}  # patterns above are NaN or infinity, which are never used


def bits(element: str) -> int:
    """Bits of one element, sign included."""
    return 1 + int(element[1]) + int(element[3])


@cache
@torch.inference_mode(False)  # a cached tensor outlives the mode it was first asked for in
def magnitudes(element: str) -> Tensor:
    """The non-negative finite values in the order of their bit patterns, float32 (P,)."""
    exponent, mantissa = int(element[1]), int(element[3])
    bias = max(2 ** (exponent - 1) - 1, 1)
    pattern = torch.arange(_FINITE.get(element, 2 ** (exponent + mantissa)), dtype=torch.float64, device="cpu")
    power, fraction = pattern // 2**mantissa, pattern % 2**mantissa / 2**mantissa
    subnormal = power == 0
    return (torch.where(subnormal, fraction, 1 + fraction) * torch.exp2(power + subnormal - bias)).float()


def largest(element: str) -> float:
    """The largest finite magnitude."""
    return magnitudes(element)[-1].item()


@cache
@torch.inference_mode(False)
def _boundaries(element: str) -> Tensor:
    """Between patterns p and p + 1, so that the even one of them gets a tie: float32 (P - 1,)."""
    table = magnitudes(element)
    middle = (table[1:] + table[:-1]) / 2
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros_like(middle[1::2]))
    return middle


def encode(values: Tensor, element: str) -> Tensor:
    """Bit patterns, int32, of float32 values: nearest, ties to even, saturating. The sign of zero is kept."""
    pattern = torch.bucketize(values.abs(), _boundaries(element).to(values.device), out_int32=True)
    return pattern + torch.signbit(values).to(torch.int32) * 2 ** (bits(element) - 1)


def decode(patterns: Tensor, element: str) -> Tensor:
    """Float32 values of bit patterns."""
    table = magnitudes(element).to(patterns.device)
    half = 2 ** (bits(element) - 1)
    value = table[(patterns & (half - 1)).long()]
    return torch.where(patterns >= half, -value, value)


def nearest(values: Tensor, element: str) -> Tensor:
    """Values rounded to the element, float32."""
    return decode(encode(values, element), element)
