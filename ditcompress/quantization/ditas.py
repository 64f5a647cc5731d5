"""DiTAS layer-wise search of the smoothing exponent (arXiv 2409.07756): temporal-aggregated smoothing, alpha by grid.

For each alpha in {0, 0.05, ..., 1}: s = a^alpha / w^(1 - alpha), a the channel maxima over all denoising steps, w the
channel maxima of the QUANTIZED weight; the alpha with the least output error wins, everything else in full precision.
The official code re-runs the sampler for each layer; the input of a layer does not change between those runs, so we
read it from the token reservoir instead: the error of each step is estimated on its stored tokens, and the step's
activation range is exact (calibrate with one bucket for each step).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from .base import Group, Layer
from .loftq import alternate
from .smooth import factors

NEEDS = ("range", "tokens")


class Params(StrictParams):
    """`points` of the alpha grid on [0, 1]; `rounds` of the low-rank alternation; `steps` that the loss counts."""

    points: int = Field(21, ge=2, le=201)
    rounds: int = Field(10, ge=1, le=100)
    steps: int = Field(50, ge=1)


def prepare(group: Group, params: Params) -> Tensor:
    quantized = [_parts(layer, params.rounds) for layer in group.layers]
    weight_max = torch.stack([base.abs().amax(0) for base, _, _ in quantized]).amax(0)
    best, least = None, float("inf")
    for alpha in torch.linspace(0, 1, params.points).tolist():
        s = factors(group.absmax(), weight_max, alpha)
        loss = search_loss(group, quantized, s, params.steps)
        if loss < least:
            best, least = s, loss
    assert best is not None
    return best


def _parts(layer: Layer, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized weight and the low-rank factors, before smoothing."""
    fmt, format_params = resolve(layer.decision.weight)
    codes, grid, up, down = alternate(layer, rounds)
    return fmt.value(codes, grid, format_params), up, down


def search_loss(group: Group, quantized: list[tuple[Tensor, Tensor, Tensor]], s: Tensor, steps: int) -> float:
    """Sum over steps of the mean squared output error, with the activation quantizer of each layer."""
    statistics = group.statistics
    tokens, bucket = statistics.reservoir.float(), statistics.reservoir_bucket.long()
    low, high = (statistics.low / s).amin(1), (statistics.high / s).amax(1)
    keep = bucket < steps
    tokens, bucket = tokens[keep], bucket[keep]
    counts = torch.bincount(bucket, minlength=len(low)).clamp_min(1).to(tokens.dtype)
    total = 0.0
    for layer, (base, up, down) in zip(group.layers, quantized, strict=True):
        x = _quantize(tokens / s, low[bucket], high[bucket], layer)
        error = x @ (base * s + up @ (down * s)).T - tokens @ layer.weight.float().T
        total += (error.square().mean(1) / counts[bucket]).sum().item()
    return total


def _quantize(x: Tensor, low: Tensor, high: Tensor, layer: Layer) -> Tensor:
    """The layer's activation quantizer on rows of x; `low`, `high` (rows,) are the range of the whole tensor."""
    spec = layer.decision.activation
    if spec.mode == "none":
        return x
    if spec.mode == "token":
        low, high = x.amin(1), x.amax(1)
    if spec.symmetric:
        scale = (torch.maximum(high, -low) / (2 ** (spec.bits - 1) - 1)).clamp_min(1e-12)[:, None]
        return torch.round(x / scale).clamp(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) * scale
    steps = 2**spec.bits if spec.mode == "tensor" else 2**spec.bits - 1
    scale = ((high - low) / steps).clamp_min(1e-12)[:, None]
    zero = torch.round(-low[:, None] / scale)
    return ((torch.round(x / scale) + zero).clamp(0, 2**spec.bits - 1) - zero) * scale
