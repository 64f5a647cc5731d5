"""Round to nearest: every weight takes the nearest value of its grid. Needs no data."""

from __future__ import annotations

from ..formats.base import StrictParams, resolve
from .base import Encoded, Layer, pack

NEEDS: tuple[str, ...] = ()


class Params(StrictParams):
    """No parameters: the format decides everything (its `clip` searches the range)."""


def encode(layer: Layer, params: Params) -> Encoded:
    """Codes nearest to the smoothed weight; with statistics, the clip search is weighted by channel energy."""
    fmt, format_params = resolve(layer.decision.weight)
    weight = layer.effective_weight().float()
    has_gram = layer.statistics is not None and layer.statistics.gram is not None
    grid = fmt.fit(weight, format_params, layer.gram().diagonal().float() if has_gram else None)
    return Encoded(pack(layer, fmt.code(weight, grid, format_params), grid))
