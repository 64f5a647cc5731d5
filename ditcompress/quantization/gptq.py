"""GPTQ (Frantar et al. 2022, section 3), then coordinate descent: rounding that minimises the output error
tr((W - Q) H (W - Q)^T) with H the Gram matrix of the input, for any format.

The scales are fixed before rounding, so columns can be visited in order of importance; vectors (format `vq`) are coded
whole. `sweeps` passes of exact coordinate descent follow (ours); they never raise the objective. Plain rounding is kept
where it is better. With a rank, what is left is fitted by low-rank factors under the same objective, and the weight
without them is rounded again (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from ._low_rank import low_rank
from ._rounding import alternate, damped, descend, excess, gptq, objective, stacked, take
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
    return encode_many([layer], params)[0]


def encode_many(layers: Sequence[Layer], params: Params) -> list[Encoded]:
    weight = torch.cat([layer.effective_weight().float() for layer in layers])
    hessian = torch.stack([damped(layer.gram(), params.damp, layer.name) for layer in layers])
    if weight.numel() > params.large * len(layers):  # damping bounds the condition number; half the time
        hessian = hessian.float()
    codes, grids = rounded(weight, hessian, layers, params)
    if layers[0].decision.rank:
        return _with_rank(weight, hessian, layers, params, codes, grids)
    parts = codes.chunk(len(layers))
    return [Encoded(pack(layer, part, grid)) for layer, part, grid in zip(layers, parts, grids, strict=True)]


def _with_rank(
    weight: Tensor, hessian: Tensor, layers: Sequence[Layer], params: Params, codes: Tensor, grids: list[Any]
) -> list[Encoded]:
    """Low-rank parts of what rounding leaves; a weight is rounded again without its part as long as that lowers its
    objective."""
    fmt, format_params = resolve(layers[0].decision.weight)
    weights = weight.chunk(len(layers))
    best: dict[int, Encoded] = {}
    least, going = [float("inf")] * len(layers), list(range(len(layers)))
    for _ in range(1 + params.rank_rounds):
        parts, better = codes.chunk(len(going)), {}
        for i, part, grid in zip(going, parts, grids, strict=True):
            left = weights[i] - fmt.value(part, grid, format_params)
            factors = low_rank(left, layers[i].decision.rank, layers[i].generator, hessian[i])
            product = factors[0].float() @ factors[1].float()
            found = objective(left, product, hessian[i]).sum().item()
            if not found >= least[i]:
                best[i], least[i] = Encoded(pack(layers[i], part, grid), factors), found
                better[i] = weights[i] - product
        going = list(better)
        if not going:
            break
        codes, grids = rounded(
            torch.cat(list(better.values())), take(hessian, going), [layers[i] for i in going], params
        )
    return [best[i] for i in range(len(layers))]


def rounded(weight: Tensor, hessian: Tensor, layers: Sequence[Layer], params: Params) -> tuple[Tensor, list[Any]]:
    """Codes of the weights (B * out, in) in the layers' format, and the grid of each; `hessian` (B, in, in)."""
    fmt, format_params = resolve(layers[0].decision.weight)
    shape = (len(weight) // len(layers), weight.shape[1])
    parts = weight.chunk(len(layers))
    grids = [fmt.fit(w, format_params, h.diagonal().float()) for w, h in zip(parts, hessian, strict=True)]
    grid = stacked(grids, fmt, shape)
    codes = gptq(weight, hessian, grid, fmt, format_params, [layer.name for layer in layers])
    large = shape[0] * shape[1] > params.large
    if params.sweeps:
        codes = descend(weight, codes, hessian, grid, fmt, format_params, 1 if large else params.sweeps)
    if params.refit and not large:
        codes, grids = alternate(weight, codes, hessian, grids, fmt, format_params, params.refit, params.sweeps)
        grid = stacked(grids, fmt, shape)
    nearest = fmt.code(weight, grid, format_params)
    values, plain = (fmt.value(some, grid, format_params) for some in (codes, nearest))
    worse = excess(weight, values, plain, hessian) > 0
    return torch.where(worse[:, None], nearest, codes), grids
