"""Alternating low-rank residual (LoftQ; DiTAS, arXiv 2409.07756): weight = quantized part + low-rank part in 16 bits.

Repeats Wq <- Q(W - L R); (L, R) <- rank-r SVD of W - Wq. No data. The card's order holds: the weight is quantized
BEFORE smoothing and the smoothing vector is folded into the scales afterwards, which is exact for column groups.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import StrictParams, resolve
from ..formats.int import Grid, make_grid
from .base import Encoded, Layer, pack

NEEDS: tuple[str, ...] = ()
LOW_RANK = True


class Params(StrictParams):
    """`rounds` of quantize and SVD."""

    rounds: int = Field(10, ge=1, le=100)


def alternate(layer: Layer, rounds: int) -> tuple[Tensor, Grid, Tensor, Tensor]:
    """Codes, grid, L (out, r) and R (r, in) of the unsmoothed weight, or of the rotated one where nothing is smoothed.
    E202 for both: a rotation mixes the channels that the smoothing would be folded into."""
    if layer.sign is not None and layer.smooth is not None:
        raise DitcompressError("E202", layer.name, "loftq smooths after rounding, not under a rotation", "drop one")
    fmt, format_params = resolve(layer.decision.weight)
    weight = layer.weight.float() if layer.sign is None else layer.effective_weight()
    rank = layer.decision.rank
    up, down = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
    for _ in range(rounds if rank else 1):
        residual = weight - up @ down
        grid = fmt.fit(residual, format_params)
        codes = fmt.code(residual, grid, format_params)
        if rank:
            left, singular, right = torch.linalg.svd(
                weight - fmt.value(codes, grid, format_params), full_matrices=False
            )
            root = singular[:rank].sqrt()
            up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return codes, grid, up, down


def encode(layer: Layer, params: Params) -> Encoded:
    _, format_params = resolve(layer.decision.weight)
    codes, grid, up, down = alternate(layer, params.rounds)
    if layer.smooth is not None:
        if getattr(format_params, "layout", "") != "column_group":
            raise DitcompressError(
                "E202", layer.name, "loftq folds smoothing into the scales", "give the weight layout: column_group"
            )
        grid = make_grid(grid.scale * layer.smooth, grid.zero, format_params)
        down = down * layer.smooth
    low_rank = (up.to(torch.bfloat16), down.to(torch.bfloat16)) if layer.decision.rank else None
    return Encoded(pack(layer, codes, grid), low_rank)
