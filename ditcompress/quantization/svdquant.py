"""SVDQuant (Li et al., arXiv 2411.05007, section 4): smoothing, a low-rank branch in 16 bits, a 4-bit residual.

`prepare` tries the 39 exponents of the official code, each with a low-rank branch and both quantizers, on the stored
tokens. `encode` alternates L <- SVD_r(W - Q) and Q <- RTN(W - L) until the output error rises, keeps the best, then
rounds the residual to nearest or by GPTQ. Ours: randomized SVD, and the error of the linears that share an input in
place of that of the attention module. Every linear has its own down-projection (mode "exclusive" of the code).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from ._low_rank import low_rank
from ._rounding import damped, gptq
from ._trial import Trial, trial
from .base import Encoded, Group, Layer, pack

NEEDS = ("range", "tokens", "gram")
LOW_RANK = True


class Params(StrictParams):
    """`grid`: points of the exponents (20 gives 39 candidates); `iterations` of the branch, at most; `tokens` that
    errors are measured on; `residual`: how it is rounded; `damp` of GPTQ."""

    grid: int = Field(20, ge=1, le=100)
    iterations: int = Field(100, ge=1, le=1000)
    tokens: int = Field(256, ge=8)
    residual: Literal["rtn", "gptq"] = "rtn"
    damp: float = Field(0.01, gt=0, le=10)


def candidates(grid: int) -> list[tuple[float, float]]:
    """Exponents (alpha, beta) of input and weight: none, the input alone, and balanced ones."""
    steps = [i / grid for i in range(1, grid)]
    return [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]


def smoothing(absmax: Tensor, weight_max: Tensor, alpha: float, beta: float) -> Tensor:
    """lambda = a^alpha / w^beta (in,); 1 where it is zero or infinite."""
    found = absmax.double() ** alpha / weight_max.double() ** beta
    return torch.where(torch.isfinite(found) & (found > 0), found, torch.ones_like(found)).float()


def prepare(group: Group, params: Params) -> Tensor:
    weight_max = torch.stack([layer.weight.float().abs().amax(0) for layer in group.layers]).amax(0)
    best, least = torch.ones_like(weight_max), float("inf")
    for alpha, beta in candidates(params.grid):
        smooth = smoothing(group.absmax(), weight_max, alpha, beta)
        found = sum(_branch_once(replace(layer, smooth=smooth), params) for layer in group.layers)
        if found < least:
            best, least = smooth, found
    return best


def _branch_once(layer: Layer, params: Params) -> float:
    """Output error with the branch's closed form: L = SVD_r(W), Q = RTN(W - L)."""
    weight = layer.effective_weight().float()
    factors = _branch(layer, weight)
    return _error(layer, trial(layer, params.tokens), _nearest(layer, _without(weight, factors)), factors)


def _branch(layer: Layer, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    return low_rank(matrix, layer.decision.rank, torch.Generator().manual_seed(0)) if layer.decision.rank else None


def _without(weight: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    return weight if factors is None else weight - factors[0].float() @ factors[1].float()


def _nearest(layer: Layer, residual: Tensor) -> Tensor:
    fmt, params = resolve(layer.decision.weight)
    grid = fmt.fit(residual, params)
    return fmt.value(fmt.code(residual, grid, params), grid, params)


def _error(layer: Layer, measured: Trial, quantized: Tensor, factors: tuple[Tensor, Tensor] | None) -> float:
    return measured.error(quantized, factors, layer.decision.low_rank_input)


def iterate(layer: Layer, params: Params) -> tuple[tuple[Tensor, Tensor] | None, list[float]]:
    """The best low-rank branch, and the error after each iteration."""
    weight, measured = layer.effective_weight().float(), trial(layer, params.tokens)
    quantized, best, errors = torch.zeros_like(weight), None, []
    for _ in range(params.iterations if layer.decision.rank else 0):
        factors = _branch(layer, weight - quantized)
        quantized = _nearest(layer, _without(weight, factors))
        errors.append(_error(layer, measured, quantized, factors))
        if len(errors) > 1 and errors[-1] >= min(errors[:-1]):
            break
        best = factors
    return best, errors


def encode(layer: Layer, params: Params) -> Encoded:
    factors, _ = iterate(layer, params)
    residual = _without(layer.effective_weight().float(), factors)
    fmt, format_params = resolve(layer.decision.weight)
    grid = fmt.fit(residual, format_params)
    if params.residual == "gptq":
        hessian = damped(layer.gram(), params.damp, layer.name)
        codes = gptq(residual, hessian, grid, fmt, format_params, (layer.name,))
    else:
        codes = fmt.code(residual, grid, format_params)
    return Encoded(pack(layer, codes, grid), factors)
