"""GPTQ (Frantar et al. 2022, section 3), then coordinate descent: rounding that minimises the output error
tr((W - Q) H (W - Q)^T) with H the Gram matrix of the input, for any format.

Where the input is quantized too, its rounding error e is part of the problem (`noise`, ours): the layer computes
(X + E) Q^T, so the target becomes W G (G + D)^-1 and the Hessian G + D, where D is the diagonal power of E measured on
the stored tokens. In directions where the input is mostly rounding error the weight shrinks towards 0 (Wiener filter).

The scales are fixed before rounding, so columns can be visited in order of importance. `sweeps` passes of exact
coordinate descent follow (ours); they never raise the objective. Plain rounding is kept where it is better.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from ..runtime.ops.quantize_activation import fake_quantize
from ._rounding import damped, descend, gptq, objective
from .base import Encoded, Layer, pack

NEEDS = ("gram",)


class Params(StrictParams):
    """`damp`: added to the diagonal, as a fraction of its mean; `sweeps`: passes of coordinate descent;
    `noise`: count the rounding of the input."""

    damp: float = Field(0.01, gt=0, le=10)
    sweeps: int = Field(0, ge=0, le=100)
    noise: bool = False


def encode(layer: Layer, params: Params) -> Encoded:
    fmt, format_params = resolve(layer.decision.weight)
    weight, gram = layer.effective_weight().float(), layer.gram()
    if params.noise and layer.decision.activation.mode in ("token", "tensor"):
        weight, gram = against_noise(weight, gram, input_noise(layer, gram))
    hessian = damped(gram, params.damp, layer.name)
    grid = fmt.fit(weight, format_params, hessian.diagonal().float())
    codes = gptq(weight, hessian, grid, fmt, format_params, layer.name)
    if params.sweeps:
        codes = descend(weight, codes, hessian, grid, fmt, format_params, params.sweeps)
    nearest = fmt.code(weight, grid, format_params)
    worse = objective(weight, fmt.value(codes, grid, format_params), hessian) > objective(
        weight, fmt.value(nearest, grid, format_params), hessian
    )
    return Encoded(pack(layer, torch.where(worse[:, None], nearest, codes), grid))


def input_noise(layer: Layer, gram: Tensor) -> Tensor:
    """Power of the input's rounding error in each channel, (in,) float64, in units of the Gram matrix's diagonal."""
    tokens = layer.effective_tokens()
    error = fake_quantize(tokens, layer.decision.activation) - tokens
    power = tokens.double().square().sum(0)
    return gram.diagonal() * (error.double().square().sum(0) / power.clamp_min(1e-30)).clamp_max(1.0)


def against_noise(weight: Tensor, gram: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Target W G (G + D)^-1 and Gram matrix G + D of an input with independent noise of power D (in,)."""
    total = gram + torch.diag(noise + 1e-9 * gram.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(total)
    if failed:
        return weight, gram
    return torch.cholesky_solve(gram @ weight.double().t(), lower).t().float(), gram + torch.diag(noise)
