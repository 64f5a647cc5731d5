"""Peak signal-to-noise ratio of each pair, on float images before any rounding to 8 bits (rounding saturates it)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LABEL, UNIT, HIGHER_IS_BETTER, IDEAL = "PSNR of same-noise pairs", "dB", True, math.inf


def values(original: Tensor, compressed: Tensor, peak: float) -> Tensor:
    error = (compressed.double() - original.double()).flatten(1).square().mean(1)
    return torch.where(error > 0, 10 * torch.log10(peak**2 / error.clamp_min(1e-300)), torch.full_like(error, math.inf))
