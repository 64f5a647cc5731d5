"""SmoothQuant (Xiao et al. 2023, equation 4): s = max|X|^alpha / max|W|^(1 - alpha) per input channel."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams
from .base import Group

NEEDS = ("range",)
SMALLEST = 1e-4  # keeps dead channels from blowing up


class Params(StrictParams):
    """`alpha`: 0 balances the weights alone, 1 the activations alone."""

    alpha: float = Field(0.5, ge=0, le=1)


def factors(absmax: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """The smoothing vector (in,) for channel maxima of input and weight."""
    ratio = absmax.clamp_min(SMALLEST) ** alpha / weight_max.clamp_min(SMALLEST) ** (1 - alpha)
    return ratio.clamp_min(SMALLEST)


def prepare(group: Group, params: Params) -> Tensor:
    weight_max = torch.stack([layer.weight.abs().amax(0) for layer in group.layers]).amax(0)
    return factors(group.absmax(), weight_max, params.alpha)
