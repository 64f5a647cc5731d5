"""PTQ4DM (Shang et al., CVPR 2023, arXiv 2211.15736): ranges that minimise mean |x - q(x)|^2.4, static inputs.

Weights: one symmetric scale a row, a in {1..100}/100 of the largest value. Inputs: one range for the tensor, over 100
widths, and over the zero points when the values have both signs. The released code searches each batch and averages
with momentum, so its result depends on the order; here the search sees all stored tokens at once. Inputs of linears are
quantized instead of outputs, as every runtime does it (card, "Using it on DiT").
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import StrictParams, resolve
from ..formats.int import make_grid
from .base import Encoded, Layer, pack

NEEDS = ("range", "tokens")


class Params(StrictParams):
    """`points` of the range; `exponent` of the error; `values` of the input that the search looks at; `zeros`: zero
    points tried for an input with both signs."""

    points: int = Field(100, ge=2, le=1000)
    exponent: float = Field(2.4, gt=0, le=10)
    values: int = Field(4096, ge=64)
    zeros: int = Field(256, ge=2, le=256)


def static(layer: Layer, params: Params) -> tuple[Tensor, Tensor | None]:
    values = layer.effective_tokens().flatten()
    extremes = torch.stack([values.min(), values.max()])
    if len(values) > params.values:
        values = values[torch.linspace(0, len(values) - 1, params.values).long()]
    values = torch.cat([values, extremes])  # the search must see what it clips
    spec = layer.decision.activation
    if spec.symmetric:
        return symmetric_range(values[None], spec.bits, params.points, params.exponent).reshape(1), None
    return asymmetric_range(values, spec.bits, params)


def symmetric_range(rows: Tensor, bits: int, points: int, exponent: float) -> Tensor:
    """The scale (n, 1) of each row of `rows` (n, values) with the least error."""
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, least = largest / top, torch.full_like(largest, float("inf"))
    for i in range(1, points + 1):
        scale = largest * (i / points) / top
        rounded = torch.round(rows / scale).clamp(-top, top) * scale
        error = (rows - rounded).abs().pow(exponent).mean(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def asymmetric_range(values: Tensor, bits: int, params: Params) -> tuple[Tensor, Tensor]:
    """Scale and zero, each (1,), of a flat tensor with the least error."""
    levels = 2**bits - 1
    low, high = values.min().clamp_max(0), values.max().clamp_min(0)
    if low == 0 or high == 0:
        zeros = torch.tensor([0.0 if low == 0 else float(levels)])
    else:
        zeros = torch.linspace(0, levels, min(params.zeros, levels + 1)).round()
    zeros = zeros.to(values.device)
    best = (torch.ones(1), torch.zeros(1))
    least = float("inf")
    for i in range(1, params.points + 1):
        scale = ((high - low) * (i / params.points) / levels).clamp_min(1e-12)
        codes = (torch.round(values / scale) + zeros[:, None]).clamp_(0, levels)
        error = (values - (codes - zeros[:, None]) * scale).abs().pow_(params.exponent).mean(1)
        place = int(error.argmin())
        if error[place] < least:
            least, best = float(error[place]), (scale.reshape(1).float(), zeros[place].reshape(1))
    return best


def encode(layer: Layer, params: Params) -> Encoded:
    fmt, format_params = resolve(layer.decision.weight)
    if (layer.decision.weight.format, getattr(format_params, "layout", "")) != ("int", "row"):
        raise DitcompressError("E202", layer.name, "ptq4dm rounds rows to integers", "give format: int, layout: row")
    if not format_params.symmetric:
        raise DitcompressError("E202", layer.name, "ptq4dm's weights are symmetric", "give symmetric: true")
    weight = layer.effective_weight().float()
    scale = symmetric_range(weight, format_params.bits, params.points, params.exponent)
    grid = make_grid(scale, None, format_params)
    return Encoded(pack(layer, fmt.code(weight, grid, format_params), grid))
