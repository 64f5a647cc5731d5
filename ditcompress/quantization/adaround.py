"""AdaRound (Nagel et al. 2020) under BRECQ's block loss (Li et al. 2021), for integers and small floats.

Each weight lies between two grid values, W_q = lower + h(V) (upper - lower) with the rectified sigmoid h; dividing by
the local step is FP4DiT's scale-aware form (arXiv 2503.15465, section 3.2), and AdaRound's own on a uniform grid. A
penalty 1 - |2h - 1|^beta, beta from 20 to 2 after a warm-up, ends in zeros and ones. BRECQ goes block by block with
partly quantized inputs; here all blocks are trained together on the student's own, with the same loss of each block.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import DitcompressError
from ..formats.base import StrictParams, resolve
from ._trained import Quantizer
from .base import Encoded, Layer, pack

NEEDS: tuple[str, ...] = ()
GAMMA, ZETA = -0.1, 1.1
MOST_CODES = 64


class Params(StrictParams):
    """`rate` of the rounding variables; `weight` of the penalty; `beta` from and to; `warmup`: share of steps without
    penalty."""

    rate: float = Field(1e-3, gt=0)
    weight: float = Field(0.01, ge=0)
    beta_from: float = Field(20.0, gt=0)
    beta_to: float = Field(2.0, gt=0)
    warmup: float = Field(0.2, ge=0, lt=1)


class Rounding(Quantizer):
    """Rounding up or down, learned."""

    lower: Tensor
    step: Tensor
    done: Tensor

    def __init__(self, layer: Layer, params: Params) -> None:
        super().__init__()
        self.layer, self.params = layer, params
        self.rates = {"up": params.rate}
        fmt, self.format_params = resolve(layer.decision.weight)
        weight = layer.effective_weight().float()
        self.grid = fmt.fit(weight, self.format_params)
        lower, upper = neighbours(weight, self.grid, fmt, self.format_params, layer.name)
        self.register_buffer("lower", lower, persistent=False)
        self.register_buffer("step", upper - lower, persistent=False)
        self.register_buffer("done", torch.zeros(()))
        share = torch.where(self.step > 0, (weight - lower) / self.step.clamp_min(1e-30), torch.zeros_like(weight))
        self.up = nn.Parameter(inverse(share.clamp(0, 1)))

    def shares(self) -> Tensor:
        """h(V) (out, in) in [0, 1]."""
        return (torch.sigmoid(self.up) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return self.lower + self.shares() * self.step

    def penalty(self) -> Tensor | None:
        progress = float(self.done)
        if progress < self.params.warmup:
            return torch.zeros(())
        progress = (progress - self.params.warmup) / (1 - self.params.warmup)
        bend = 0.5 * (1 + math.cos(math.pi * progress))
        beta = self.params.beta_to + (self.params.beta_from - self.params.beta_to) * bend
        return self.params.weight * (1 - (2 * self.shares() - 1).abs().pow(beta)).mean()

    def after_step(self, step: int, steps: int) -> None:
        self.done.fill_((step + 1) / steps)

    def encoded(self, weight: Tensor) -> Encoded:
        fmt = resolve(self.layer.decision.weight)[0]
        hard = self.lower + (self.shares().detach() > 0.5) * self.step
        return Encoded(pack(self.layer, fmt.code(hard, self.grid, self.format_params), self.grid))


def inverse(share: Tensor) -> Tensor:
    """V with h(V) = share."""
    inner = ((share - GAMMA) / (ZETA - GAMMA)).clamp(1e-6, 1 - 1e-6)
    return torch.log(inner / (1 - inner))


def neighbours(weight: Tensor, grid: object, fmt: object, params: object, where: str) -> tuple[Tensor, Tensor]:
    """The grid values below and above each weight (equal beyond the ends), of any format of few codes."""
    codes = torch.unique(fmt.code(weight, grid, params))  # type: ignore[attr-defined]
    if len(codes) > MOST_CODES:
        raise DitcompressError("E202", where, f"{len(codes)} codes are too many to learn", "use 6 bits or fewer")
    lower, upper = torch.full_like(weight, -math.inf), torch.full_like(weight, math.inf)
    for code in codes:
        value = fmt.value(torch.full(weight.shape, int(code), dtype=torch.int32), grid, params)  # type: ignore[attr-defined]
        lower = torch.where((value <= weight) & (value > lower), value, lower)
        upper = torch.where((value >= weight) & (value < upper), value, upper)
    lower = torch.where(torch.isinf(lower), upper, lower)
    return lower, torch.where(torch.isinf(upper), lower, upper)


def trainable(layer: Layer, params: Params) -> Quantizer:
    return Rounding(layer, params)


def encode(layer: Layer, params: Params) -> Encoded:
    """Rounding to nearest: the stored form before any training."""
    fmt, format_params = resolve(layer.decision.weight)
    weight = layer.effective_weight().float()
    grid = fmt.fit(weight, format_params)
    return Encoded(pack(layer, fmt.code(weight, grid, format_params), grid))
