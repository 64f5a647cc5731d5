"""A normalized and modulated stream that nothing has read yet: kernels that round it may do that work themselves."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Seen = tuple[tuple[Tensor, int], ...]


def kind_of(norm: nn.Module) -> str:
    """ "layer" or "rms" for the norms of torch and of diffusers, else nothing."""
    theirs = sys.modules.get("diffusers.models.normalization")
    kinds = {nn.LayerNorm: "layer", nn.RMSNorm: "rms", getattr(theirs, "FP32LayerNorm", None): "layer",
             getattr(theirs, "RMSNorm", None): "rms"}  # fmt: skip
    return kinds.get(type(norm), "")


def check(seen: Seen) -> None:
    """RuntimeError where a tensor is not what it was."""
    if any(tensor._version != version for tensor, version in seen):
        raise RuntimeError("a tensor was changed before what was put off could read it: set_fusion(model, False)")


@dataclass(frozen=True)
class Normed:
    """norm(x) * scale + shift of x (B, T, K), scale and shift (B or 1, 1, K), in `dtype`. `seen`: these and their
    versions; `read` holds its rounded forms."""

    norm: nn.Module
    x: Tensor
    dtype: torch.dtype
    seen: Seen
    scale: Tensor | None = None
    shift: Tensor | None = None
    read: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return kind_of(self.norm)

    @property
    def eps(self) -> float:
        eps = getattr(self.norm, "eps", None)
        computed = torch.float32 if self.x.itemsize < 4 else self.x.dtype
        return float(torch.finfo(computed).eps if eps is None else eps)  # as torch's RMSNorm

    def compute(self) -> Tensor:
        """Its numbers, by the operations one by one."""
        y: Tensor = type(self.norm).forward(self.norm, self.x)
        y = y if self.scale is None else y * self.scale
        return (y if self.shift is None else y + self.shift).to(self.dtype)


def rows(vector: Tensor | None, count: int) -> Tensor | None:
    """A vector for each sample, (B or 1, 1, K) to (B, K)."""
    return None if vector is None else vector.expand(count, 1, vector.shape[-1]).reshape(count, -1)
