"""Tables of small floating-point elements, and rounding to them.

OCP Microscaling Formats (MX) v1.0, section 5.3, for e2m1, e2m3, e3m2, e4m3 (no infinities, one NaN) and e5m2.
e3m0 (HQ-DiT, Liu et al. 2024) is zero and seven powers of two; e1m2 is the uniform grid 0, 1/4, .. 7/4.

A code is the raw bit pattern: sign, exponent, mantissa. The magnitudes of an element rise with the pattern, so
the index into the table of magnitudes is the pattern without its sign bit.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Element = Literal["e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"]
_FINITE = {"e4m3": 127, "e5m2": 124}  # patterns above are NaN or infinity, which are never used


def bits(element: str) -> int:
    """Bits of one element, sign included."""
    return 1 + int(element[1]) + int(element[3])


def _magnitudes(element: str) -> Tensor:
    exponent, mantissa = int(element[1]), int(element[3])
    bias = max(2 ** (exponent - 1) - 1, 1)
    pattern = torch.arange(_FINITE.get(element, 2 ** (exponent + mantissa)), dtype=torch.float64, device="cpu")
    power, fraction = pattern // 2**mantissa, pattern % 2**mantissa / 2**mantissa
    subnormal = power == 0
    return (torch.where(subnormal, fraction, 1 + fraction) * torch.exp2(power + subnormal - bias)).float()


def _boundaries(table: Tensor) -> Tensor:
    """Between patterns p and p + 1, so that the even one of them gets a tie: float32 (P - 1,)."""
    middle = (table[1:] + table[:-1]) / 2
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros_like(middle[1::2]))
    return middle


with torch.inference_mode(False):  # made at import: a traced forward pass can read them, not make them
    _TABLES = {element: _magnitudes(element) for element in get_args(Element)}
    _MIDDLES = {element: _boundaries(table) for element, table in _TABLES.items()}
_LARGEST = {element: table[-1].item() for element, table in _TABLES.items()}


def magnitudes(element: str) -> Tensor:
    """The non-negative finite values in the order of their bit patterns, float32 (P,)."""
    return _TABLES[element]


def largest(element: str) -> float:
    """The largest finite magnitude."""
    return _LARGEST[element]


def encode(values: Tensor, element: str) -> Tensor:
    """Bit patterns, int32, of float32 values: nearest, ties to even, saturating. The sign of zero is kept."""
    pattern = torch.bucketize(values.abs(), _MIDDLES[element].to(values.device), out_int32=True)
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
