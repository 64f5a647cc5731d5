"""A normalized and modulated stream that nothing has read yet: kernels that round it may do that work themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NORMS = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms"}  # classes of torch and diffusers


@dataclass(frozen=True)
class Normed:
    """norm(x) * scale + shift of x (B, T, K), scale and shift (B or 1, 1, K), in `dtype`. `read` holds its rounded
    forms, `version` says whether x is still what it was."""

    norm: nn.Module
    x: Tensor
    dtype: torch.dtype
    version: int
    scale: Tensor | None = None
    shift: Tensor | None = None
    read: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return NORMS[type(self.norm).__name__]

    @property
    def eps(self) -> float:
        eps = getattr(self.norm, "eps", None)
        return float(torch.finfo(self.x.dtype).eps if eps is None else eps)  # as torch's RMSNorm

    def compute(self) -> Tensor:
        """Its numbers, by the operations one by one."""
        y: Tensor = type(self.norm).forward(self.norm, self.x)
        y = y if self.scale is None else y * self.scale
        return (y if self.shift is None else y + self.shift).to(self.dtype)


def rows(vector: Tensor | None, count: int) -> Tensor | None:
    """A vector for each sample, (B or 1, 1, K) to (B, K)."""
    return None if vector is None else vector.expand(count, 1, vector.shape[-1]).reshape(count, -1)
