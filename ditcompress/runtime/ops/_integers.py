"""What integer products share, on every device: the schemes that they run, and what they need beside the weight."""

from __future__ import annotations

import torch

from ...formats.base import is_int8
from ..scheme import Scheme
from .base import Layer, Made


def integers(scheme: Scheme) -> bool:
    """Tokens of at most 8 bits with one scale each, weights that are INT8 with a scale a row."""
    tokens = scheme.activation
    return tokens.mode == "token" and tokens.element == "int" and not tokens.group and is_int8(scheme.weight)


def prepare(layer: Layer, dtype: torch.dtype, keep: bool) -> Made:
    """`row_sum` (out,) float32 of the codes, where tokens have a zero; with `keep`, `codes` and `scale` too."""
    made: Made = {}
    if layer.scheme.activation.symmetric and not keep:
        return made
    codes, scale = layer.as_int8()
    if not layer.scheme.activation.symmetric:
        made["row_sum"] = codes.sum(1, dtype=torch.int32).float()
    return {**made, "codes": codes.contiguous(), "scale": scale} if keep else made
