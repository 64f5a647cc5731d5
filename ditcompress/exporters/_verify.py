"""What every exporter owes its user: the file holds the values that were meant, all of them finite."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..errors import DitcompressError


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; E701 when a finite value does not fit (float16 ends at 65504)."""
    result = tensor.to(dtype)
    lost = int((torch.isfinite(tensor) & ~torch.isfinite(result)).sum())
    if lost:
        short = str(dtype).removeprefix("torch.")
        raise DitcompressError("E701", name, f"{lost} values do not fit {short}", "export with --dtype bfloat16")
    return result


def check_written(again: Checkpoint, digests: Mapping[str, str]) -> None:
    """E323 names the first tensor that does not read back as it was written."""
    for name, expected in digests.items():
        if digest(again.read(name)) != expected:
            where = f"{again.tensors[name].file.name}: {name}"
            raise DitcompressError("E323", where, "reads back other bytes than were written", "check the disk")
