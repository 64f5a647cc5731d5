"""Structural similarity of each pair (Wang et al. 2004): Gaussian window of width 11, sigma 1.5, K1 0.01, K2 0.03.

Images smaller than the window use the largest odd window that fits; windows lie wholly inside the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

LABEL, UNIT, HIGHER_IS_BETTER, IDEAL = "SSIM of same-noise pairs", "", True, 1.0


def window(size: int, sigma: float = 1.5) -> Tensor:
    """Separable Gaussian weights (size, size), summing to one."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    line = line / line.sum()
    return torch.outer(line, line)


def values(original: Tensor, compressed: Tensor, peak: float) -> Tensor:
    x, y = original.double(), compressed.double()
    channels = x.shape[1]
    size = min(11, x.shape[-1], x.shape[-2])
    size -= 1 - size % 2
    kernel = window(size).expand(channels, 1, size, size)

    def blur(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image, kernel, groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)
