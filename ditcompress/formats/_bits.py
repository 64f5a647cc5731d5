"""Dense packing of b-bit codes into bytes, b = 1..16, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_width(columns: int, bits: int) -> int:
    """Bytes that hold `columns` codes of `bits` bits."""
    return (columns * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 <= c < 2**bits, shape (rows, columns), to uint8 (rows, ceil(columns*bits/8)), low bits first.

    Each row starts on a byte; the unused high bits of its last byte are zero.
    """
    rows, columns = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 4:  # the common case without the detour over single bits
        even = torch.nn.functional.pad(codes.to(torch.uint8), (0, columns % 2))
        return even[:, 0::2] | (even[:, 1::2] << 4)
    shifts = torch.arange(bits, device=codes.device)
    flat = ((codes.to(torch.int32).unsqueeze(-1) >> shifts) & 1).reshape(rows, columns * bits)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).reshape(rows, -1, 8)
    return (flat << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


_LANES = {4: torch.int16, 2: torch.int32, 1: torch.int64}  # as wide as the codes of one byte once they are bytes


def _spread(packed: Tensor, bits: int) -> Tensor:
    """The codes of every byte, uint8 (rows, bytes * 8 / bits): each moves to a byte of its own within one wide number,
    three times as fast as writing every second byte."""
    count, wide = 8 // bits, packed.contiguous().to(_LANES[bits])
    moved = (wide << (8 - bits) * (count - 1)).bitwise_or_(wide)
    for number in range(1, count - 1):
        moved.bitwise_or_(wide << (8 - bits) * number)
    mask = sum((2**bits - 1) << 8 * number for number in range(count))
    return moved.bitwise_and_(mask).view(torch.uint8)  # its lowest byte comes first


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: codes of shape (rows, columns), uint8, or int32 where more than 8 bits need it.

    Codes are taken out of whole bytes, all first ones of a period together, then all second ones: no bit is ever a
    tensor element of its own, which made this 10 times slower.
    """
    rows = packed.shape[0]
    if bits == 8:
        return packed
    if bits in _LANES:
        return _spread(packed, bits)[:, :columns]
    period, count = bits // math.gcd(bits, 8), 8 // math.gcd(bits, 8)  # bytes that hold this many codes
    dtype = torch.uint8 if bits < 8 else torch.int32
    parts = torch.nn.functional.pad(packed, (0, -packed.shape[1] % period)).reshape(rows, -1, period).to(dtype)
    codes = torch.empty(rows, parts.shape[1], count, dtype=dtype, device=packed.device)
    for number in range(count):
        byte, shift = divmod(number * bits, 8)
        value = parts[..., byte] >> shift
        for more in range(1, (shift + bits + 7) // 8):
            value |= parts[..., byte + more] << (8 * more - shift)
        codes[..., number] = value & (2**bits - 1)
    return codes.reshape(rows, -1)[:, :columns]
