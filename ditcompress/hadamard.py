"""Hadamard transforms for every width in use: fast, orthonormal, with random signs.

A width n = 2^a * m has a transform H_(2^a) x H_m where a Hadamard matrix of order m is known: 1, 2, Paley I (m = q + 1,
q prime, q = 3 mod 4) or Paley II (m = 2 (q + 1), q prime, q = 1 mod 4). Signs are flipped first, x D H, because the
first column of these matrices is constant: a common mean of the channels would become one large outlier.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FACTOR = 64  # the power-of-two part is applied in Kronecker factors of at most this order


def _prime(q: int) -> bool:
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(order: int) -> tuple[str, int] | None:
    """Which construction gives this order, and its prime."""
    if order % 4:
        return None
    if _prime(order - 1) and (order - 1) % 4 == 3:
        return "I", order - 1
    if _prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return "II", order // 2 - 1
    return None


@cache
def factors(width: int) -> tuple[int, int] | None:
    """(power of two, order of the rest) with the smallest rest; None where no transform of this width is known."""
    power, rest = 1, width
    while rest % 2 == 0:
        power, rest = 2 * power, rest // 2
    while power >= 1:
        if rest in (1, 2) or _paley(rest):
            return power, rest
        power, rest = power // 2, 2 * rest
    return None


def block_for(width: int, wanted: int = 0) -> int:
    """The order of the transform that a width gets: `wanted` (0: the whole width) where it divides the width and is
    known, else the largest power of two that divides the width and is not above `wanted`. 1 means that there is none
    worth having."""
    block = wanted or width
    if width % block == 0 and factors(block) is not None:
        return block
    power = width & -width
    while power > block:
        power //= 2
    return power


@cache
@torch.inference_mode(False)
def matrix(order: int) -> Tensor:
    """A Hadamard matrix (order, order) of +-1, float32. ValueError where none is known."""
    if order == 1:
        return torch.ones(1, 1, device="cpu")
    found = _paley(order)
    if order & (order - 1) == 0:
        half = matrix(order // 2)
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    if found is None:
        split = factors(order)
        if split is None:
            raise ValueError(f"no Hadamard matrix of order {order} is known here")
        return torch.kron(matrix(split[0]), matrix(split[1]))
    kind, q = found
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, q)], dtype=torch.float32, device="cpu")
    index = torch.arange(q, device="cpu")
    jacobsthal = character[(index[None] - index[:, None]) % q]
    sign = -1.0 if kind == "I" else 1.0
    core = torch.zeros(q + 1, q + 1, device="cpu")
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, sign, jacobsthal
    eye = torch.eye(q + 1, device="cpu")
    if kind == "I":
        return eye + core
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")) + torch.kron(
        eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], device="cpu")
    )


@cache
def _steps(block: int) -> tuple[int, ...]:
    """Orders of the Kronecker factors, applied one after another."""
    found = factors(block)
    assert found is not None, block
    power, rest = found
    orders = [rest] if rest > 1 else []
    while power > 1:
        orders.insert(0, min(power, FACTOR))
        power //= orders[0]
    return tuple(orders)


def transform(x: Tensor, block: int, *, back: bool = False) -> Tensor:
    """x (..., n) times the orthonormal block-diagonal transform of order `block`, or (`back`) its transpose."""
    shape, orders = x.shape, _steps(block)
    rows, before = x.numel() // block, 1
    for order in orders:
        h = _orthonormal(order, x.dtype, x.device)
        h, after = h.t() if back else h, block // before // order
        if after == 1:
            x = x.reshape(rows * before, order) @ h
        else:
            x = torch.matmul(h.t(), x.reshape(rows * before, order, after))
        before *= order
    return x.reshape(shape)


@cache
def _orthonormal(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return (matrix(order).double() / order**0.5).to(dtype).to(device)


def signs(width: int, seed: int) -> Tensor:
    """Random signs (width,) float32 of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1


def pack_signs(values: Tensor) -> Tensor:
    """Signs (n,) as bits, uint8 (ceil(n / 8),), low bits first; 1 is negative."""
    negative = torch.nn.functional.pad((values < 0).to(torch.uint8), (0, -len(values) % 8)).reshape(-1, 8)
    return (negative << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(1).to(torch.uint8)


def unpack_signs(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_signs`, float32 (width,)."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return 1 - 2 * bits.flatten()[:width].float()


def rotate(x: Tensor, sign: Tensor, block: int) -> Tensor:
    """x (..., n) times D H: signs flipped, then transformed."""
    return transform(x * sign.to(x), block)


def unrotate(x: Tensor, sign: Tensor, block: int) -> Tensor:
    """x (..., n) times (D H)^T."""
    return transform(x, block, back=True) * sign.to(x)
