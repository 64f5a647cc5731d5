"""GPTQ (Frantar et al. 2022, section 3), then coordinate descent: rounding that minimises the output error
tr((W - Q) H (W - Q)^T) with H the Gram matrix of the input, for any format.

The scales are fixed before rounding, so columns can be visited in order of importance; vectors (format `vq`) are coded
whole. `sweeps` passes of exact coordinate descent follow (ours); they never raise the objective. Plain rounding is kept
where it is better. With a rank, what is left is fitted by low-rank factors under the same objective, and the weight
without them is rounded again (ours).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from ._low_rank import low_rank
from ._rounding import alternate, damped, descend, gptq, objective
from .base import Encoded, Layer, pack

NEEDS = ("gram",)
LOW_RANK = True


class Params(StrictParams):
    """`damp`: added to the diagonal, as a fraction of its mean; `sweeps`: passes of coordinate descent;
    `refit`: rounds of fitting scales or codebooks to the codes, each followed by `sweeps` passes (ours);
    `rank_rounds`: times that a weight is rounded again without its low-rank part; weights with
    more than `large` values get one pass of descent at most and no refit, so that wide models take minutes."""

    damp: float = Field(0.01, gt=0, le=10)
    sweeps: int = Field(0, ge=0, le=100)
    refit: int = Field(0, ge=0, le=100)
    rank_rounds: int = Field(1, ge=0, le=100)
    large: int = Field(1_000_000, ge=0)


def encode(layer: Layer, params: Params) -> Encoded:
    weight, gram = layer.effective_weight().float(), layer.gram()
    hessian = damped(gram, params.damp, layer.name)
    if weight.numel() > params.large:  # damping bounds the condition number; the factorisations take half the time
        hessian = hessian.float()
    codes, grid = rounded(weight, hessian, layer, params)
    if not layer.decision.rank:
        return Encoded(pack(layer, codes, grid))
    fmt, format_params = resolve(layer.decision.weight)
    best, least = None, float("inf")
    for _ in range(1 + params.rank_rounds):
        left = weight - fmt.value(codes, grid, format_params)
        factors = low_rank(left, layer.decision.rank, layer.generator, hessian)
        product = factors[0].float() @ factors[1].float()
        found = objective(left, product, hessian).sum().item()
        if found >= least:
            break
        best, least = Encoded(pack(layer, codes, grid), factors), found
        codes, grid = rounded(weight - product, hessian, layer, params)
    assert best is not None
    return best


def rounded(weight: Tensor, hessian: Tensor, layer: Layer, params: Params) -> tuple[Tensor, Any]:
    """Codes and grid of `weight` (out, in) in the layer's format."""
    fmt, format_params = resolve(layer.decision.weight)
    grid = fmt.fit(weight, format_params, hessian.diagonal().float())
    codes = gptq(weight, hessian, grid, fmt, format_params, layer.name)
    large = weight.numel() > params.large
    if params.sweeps:
        codes = descend(weight, codes, hessian, grid, fmt, format_params, 1 if large else params.sweeps)
    if params.refit and not large:
        codes, grid = alternate(weight, codes, hessian, grid, fmt, format_params, params.refit, params.sweeps)
    nearest = fmt.code(weight, grid, format_params)
    worse = objective(weight, fmt.value(codes, grid, format_params), hessian) > objective(
        weight, fmt.value(nearest, grid, format_params), hessian
    )
    return torch.where(worse[:, None], nearest, codes), grid
