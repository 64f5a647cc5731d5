"""Weights of any packed format on a GPU, products in floating point: decoded by one Triton kernel, or, for a few rows
(modulation, time embedding), multiplied as they are decoded, which reads only the packed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from . import reference
from .base import Layer, Made, finished
from .triton import FORMATS, available, expected

SAYS = "decoded by one kernel; for up to 64 rows multiplied as it is decoded (Triton)"


def supports(scheme: Scheme, device: str) -> bool:
    return device == "cuda" and scheme.weight.format in FORMATS and expected()


def prepare(layer: Layer, dtype: torch.dtype, keep: bool) -> Made:
    return reference.prepare(layer, dtype, keep)


def run(layer: Layer, x: Tensor, made: Made, dtype: torch.dtype) -> Tensor:
    if made or not available(x.device):
        return reference.run(layer, x, made, dtype)
    from .triton import decode, small_m

    spec, stored, shape = layer.scheme.weight, layer.stored_tensors(), (layer.out_features, layer.in_features)
    rows = x.numel() // x.shape[-1]
    few = small_m.supported(spec, rows)
    if not (few or decode.supported(spec, shape)):
        return reference.run(layer, x, made, dtype)
    x = layer.transformed(x)
    rounded = reference.on_grid(layer, x).to(dtype)
    if few:
        y = small_m.product(rounded, spec, stored, shape)
    else:
        y = torch.nn.functional.linear(rounded, decode.decode_float(spec, stored, shape, dtype))
    return finished(layer, y, x, rounded, dtype)
