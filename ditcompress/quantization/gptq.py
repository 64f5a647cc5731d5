"""GPTQ (Frantar et al. 2022, section 3), then coordinate descent: rounding that minimises the output error
tr((W - Q) H (W - Q)^T) with H the Gram matrix of the input, for any format.

The scales are fixed before rounding, so columns can be visited in order of importance; vectors (format `vq`) are coded
whole. `sweeps` passes of exact
coordinate descent follow (ours); they never raise the objective. Plain rounding is kept where it is better.
"""

from __future__ import annotations

import torch
from pydantic import Field

from ..formats.base import StrictParams, resolve
from ._rounding import alternate, damped, descend, gptq, objective
from .base import Encoded, Layer, pack

NEEDS = ("gram",)


class Params(StrictParams):
    """`damp`: added to the diagonal, as a fraction of its mean; `sweeps`: passes of coordinate descent;
    `refit`: rounds of fitting scales or codebooks to the codes, each followed by `sweeps` passes (ours)."""

    damp: float = Field(0.01, gt=0, le=10)
    sweeps: int = Field(0, ge=0, le=100)
    refit: int = Field(0, ge=0, le=100)


def encode(layer: Layer, params: Params) -> Encoded:
    fmt, format_params = resolve(layer.decision.weight)
    weight, gram = layer.effective_weight().float(), layer.gram()
    hessian = damped(gram, params.damp, layer.name)
    grid = fmt.fit(weight, format_params, hessian.diagonal().float())
    codes = gptq(weight, hessian, grid, fmt, format_params, layer.name)
    if params.sweeps:
        codes = descend(weight, codes, hessian, grid, fmt, format_params, params.sweeps)
    if params.refit:
        codes, grid = alternate(weight, codes, hessian, grid, fmt, format_params, params.refit, params.sweeps)
    nearest = fmt.code(weight, grid, format_params)
    worse = objective(weight, fmt.value(codes, grid, format_params), hessian) > objective(
        weight, fmt.value(nearest, grid, format_params), hessian
    )
    return Encoded(pack(layer, torch.where(worse[:, None], nearest, codes), grid))
