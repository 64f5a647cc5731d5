"""The block Hadamard transform of rows in registers, as `hadamard.transform` defines it, on the tensor cores.

The transform of order 2^a * m is a Kronecker product, so it is applied as a few small products, each over some bits of
the column's index. A matrix of +-1 is exact in bfloat16, and a float32 row is split into a bfloat16 and what that
leaves (16 bits of mantissa together, error 2**-17 of the largest element). Orders with m > 1 (Paley) put every run of m
columns into `pad` places, the next power of two: loads and stores place them, nothing else needs to know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....hadamard import factors, matrix
from ._common import LARGEST_ROW, power_of_two

SMALLEST, LARGEST = 16, 64  # orders of the products: what a tensor core takes, what is still cheap


@dataclass(frozen=True)
class Rotation:
    """`rest` columns lie in `pad` places; `places` of a whole row; each step is (order, stride of its index)."""

    rest: int
    pad: int
    places: int
    steps: tuple[tuple[int, int], ...]
    matrices: Tensor | None  # all steps' +-1 matrices one after another, bfloat16
    norm: float

    def step(self, number: int) -> tuple[int, int]:
        """(order, stride) of a step; order 0 where there is none."""
        return self.steps[number] if number < len(self.steps) else (0, 1)


def _chunks(bits: int) -> list[int]:
    """Bits of each product over a power of two: as few products as possible, of equal sizes."""
    count = 1 if bits <= 6 else -(-bits // 5)
    return [bits // count + (i < bits % count) for i in range(count)] if bits else []


@functools.cache
def plan(width: int, block: int, device: torch.device) -> Rotation | None:
    """How rows of `width` are transformed in blocks; None where no kernel does it."""
    if block <= 1:
        return Rotation(1, 1, power_of_two(width), (), None, 1.0)
    found = factors(block)
    if width % block or found is None:
        return None
    power, rest = found
    pad = 1 if rest == 1 else max(SMALLEST, power_of_two(rest))
    places = max(power_of_two(width // rest) * pad, LARGEST * SMALLEST)
    if pad > LARGEST or places > LARGEST_ROW:
        return None
    return Rotation(rest, pad, places, *_steps(power, rest, pad, places, device), block**-0.5)


def _steps(
    power: int, rest: int, pad: int, places: int, device: torch.device
) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    steps, matrices = [], []
    if rest > 1:
        core = torch.zeros(pad, pad)
        core[:rest, :rest] = matrix(rest)
        steps.append((pad, 1))
        matrices.append(core)
    start, top = pad.bit_length() - 1, places.bit_length() - 1
    for bits in _chunks(power.bit_length() - 1):
        core, first = matrix(2**bits), start
        if bits < 4:  # widened by bits that it leaves alone
            first = min(start, top - 4)
            below, above = start - first, 4 - bits - (start - first)
            core = torch.kron(torch.kron(torch.eye(2**above), core), torch.eye(2**below))
        steps.append((len(core), 2**first))
        matrices.append(core)
        start += bits
    with torch.inference_mode(False):
        flat = torch.cat([core.flatten() for core in matrices]).to(torch.bfloat16).to(device)
    return tuple(steps), flat


@triton.jit
def _product(
    x: tl.tensor,
    h: tl.tensor,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """x (ROWS, PLACES) times a (D, D) matrix over the index that has stride C."""
    A: tl.constexpr = ROWS * PLACES // (D * C)
    i = tl.arange(0, D)
    m = tl.load(h + i[:, None] * D + i[None, :]).to(DOT)
    if C > 1:
        x = tl.permute(tl.reshape(x, (A, D, C)), (0, 2, 1))
    x = tl.reshape(x, (A * C, D))
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    y = tl.dot(low.to(DOT), m, tl.dot(high.to(DOT), m))
    if C > 1:
        y = tl.permute(tl.reshape(y, (A, C, D)), (0, 2, 1))
    return tl.reshape(y, (ROWS, PLACES))


@triton.jit
def apply(
    x: tl.tensor,
    h: tl.tensor,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    D0: tl.constexpr,
    C0: tl.constexpr,
    D1: tl.constexpr,
    C1: tl.constexpr,
    D2: tl.constexpr,
    C2: tl.constexpr,
    D3: tl.constexpr,
    C3: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Up to four products; the norm is left to the caller."""
    if D0 > 0:
        x = _product(x, h, ROWS, PLACES, D0, C0, DOT)
    if D1 > 0:
        x = _product(x, h + D0 * D0, ROWS, PLACES, D1, C1, DOT)
    if D2 > 0:
        x = _product(x, h + D0 * D0 + D1 * D1, ROWS, PLACES, D2, C2, DOT)
    if D3 > 0:
        x = _product(x, h + D0 * D0 + D1 * D1 + D2 * D2, ROWS, PLACES, D3, C3, DOT)
    return x
