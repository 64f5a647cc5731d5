"""Fixed-seed random convolutions: the last resort where there is neither a classifier nor a labelled reference.

They see gross faults and are blind to fine ones, so everything they measure is labelled weak.
"""

from __future__ import annotations

import torch
from torch import nn

from . import Extractor, Request, module_digest

LABEL = "random convolutions"
DIMENSIONS = 64


def open_extractor(request: Request) -> Extractor:
    """Three random layers, mean and deviation of each of the last 32 channels: (n, 64)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        channels = request.shape[0]
        for width in (16, 32, DIMENSIONS // 2):
            layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.1)]
            channels = width
        body = nn.Sequential(*layers).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        maps = body(images).flatten(2)
        return torch.cat([maps.mean(2), maps.std(2, unbiased=False)], 1)

    return Extractor(LABEL, module_digest(body), features, weak=True)
