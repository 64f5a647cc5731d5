"""TerDiT (Lu et al., arXiv 2405.14854): ternary weights by quantization-aware distillation.

T = clip(round(W / mean|W|), -1, 1), W_q = alpha T with a learned alpha, straight-through gradients to W. In place of
training from scratch the full-precision model is the teacher. adaLN linears take `output_norm: rms`, whose gain starts
at the teacher's outputs (the paper's, trained from scratch, starts at one). alpha starts at its least-squares value.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import DitcompressError
from ..formats._scales import Grid
from ..formats.base import StrictParams, resolve
from ._trained import Quantizer
from .base import Encoded, Layer, pack

NEEDS: tuple[str, ...] = ()
EPS = 1e-6


class Params(StrictParams):
    """`scale_rate`: learning rate of alpha over that of the weights."""

    scale_rate: float = Field(1e-3, gt=0)
    weight_rate: float | None = Field(None, gt=0)


class Ternary(Quantizer):
    """A weight on its way through {-1, 0, 1}; one gamma and one alpha a tensor or row."""

    trains_weight = trains_bias = True

    def __init__(self, layer: Layer, params: Params) -> None:
        super().__init__()
        self.layer = layer
        self.rows = getattr(resolve(layer.decision.weight)[1], "layout", "") == "row"
        self.rates = {"alpha": params.scale_rate} | ({"weight": params.weight_rate} if params.weight_rate else {})
        with torch.no_grad():
            weight = layer.effective_weight().float()
            codes = self.codes(weight)
            size = (len(weight), 1) if self.rows else (1, 1)
            power, dot = codes.square(), weight * codes
            over = 1 if self.rows else (0, 1)
            self.alpha = nn.Parameter((dot.sum(over) / power.sum(over).clamp_min(1)).reshape(size))

    def codes(self, weight: Tensor) -> Tensor:
        """-1, 0 or 1, float, (out, in)."""
        gamma = weight.abs().mean(1, keepdim=True) if self.rows else weight.abs().mean()
        return torch.round(weight / (gamma + EPS)).clamp(-1, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return self.alpha * (weight + (self.codes(weight.detach()) - weight).detach())

    def encoded(self, weight: Tensor) -> Encoded:
        codes, alpha = self.codes(weight), self.alpha.detach()
        codes = codes * torch.where(alpha < 0, -1.0, 1.0)  # stored scales are positive
        return Encoded(pack(self.layer, codes.to(torch.int32), Grid(alpha.abs())))


def trainable(layer: Layer, params: Params) -> Quantizer:
    if layer.decision.weight.format != "ternary" or resolve(layer.decision.weight)[1].layout == "group":
        raise DitcompressError("E202", layer.name, "terdit trains ternary weights", "give format: ternary, no groups")
    return Ternary(layer, params)


def encode(layer: Layer, params: Params) -> Encoded:
    """The stored form before any training."""
    return Ternary(layer, params).encoded(layer.effective_weight().float())
