"""E4M3 tokens times E4M3 weights with one scale a row, on a GPU: rounded in one Triton pass, multiplied by
`torch._scaled_mm` (compute capability 9.0 and later; in floating point before)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from . import reference
from .base import Layer, Made, finished
from .triton import available, expected

SAYS = "tokens rounded to E4M3 in one pass (Triton), row-wise scaled product (cuBLAS)"


def supports(scheme: Scheme, device: str) -> bool:
    """E4M3 on both sides, one scale a token and a row."""
    tokens, weight = scheme.activation, scheme.weight
    plain = tokens.mode == "token" and tokens.element == "e4m3" and not tokens.group and tokens.scale == "float32"
    rows = weight.format == "fp" and weight.params.get("element") == "e4m3" and weight.params.get("layout", "") == "row"
    return device == "cuda" and plain and rows and weight.params.get("scale", "float32") != "uint8" and expected()


def prepare(layer: Layer, dtype: torch.dtype, keep: bool) -> Made:
    return {}


def run(layer: Layer, x: Tensor, made: Made, dtype: torch.dtype) -> Tensor:
    if not available(x.device):
        return reference.run(layer, x, {}, dtype)
    from .triton import fp8, library, rows

    scheme, width = layer.scheme, layer.in_features
    if scheme.rank or not rows.supported(width, 0, x.device):
        return reference.run(layer, x, {}, dtype)
    x = layer.transformed(x)
    codes, scale, _, _, _ = library.quantize_rows(x, element="e4m3")
    stored = layer.stored_tensors()
    weight, weight_scale = stored["qweight"].view(torch.float8_e4m3fn), stored["scale"].float()
    y = fp8.product(codes, scale, weight, weight_scale, dtype=dtype)
    return finished(layer, y.reshape(*x.shape[:-1], layer.out_features), x, None, dtype)
