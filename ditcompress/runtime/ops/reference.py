"""Any format on any device: decode the weight, round the input to its grid, multiply in floating point.

Unless it is kept, the weight is decoded at each call and dropped, so memory stays that of the packed form; a float32
input keeps float32 accuracy, a bfloat16 input multiplies in bfloat16. Weights that are INT8 times a scale a row are
multiplied as such, exact in any dtype, and scaled afterwards: decoding stays in bytes, which is 5 times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import fake_quantize
from ..scheme import Scheme
from ._shared import rounded_once
from .base import Layer, Made, finished

SAYS = "decoded to floating point, product in the input's type"


def supports(scheme: Scheme, device: str) -> bool:
    """Always."""
    return True


def decoded(layer: Layer, dtype: torch.dtype) -> Made:
    """`weight` (out, in) in `dtype`; `scale` (out,) float32 of the output where the weight was left unscaled."""
    if not layer.is_int8:
        return {"weight": layer.decoded().to(dtype)}
    codes, scale = layer.as_int8()
    if dtype == torch.float16:  # whose range ends at 65504: sums of codes would leave it
        return {"weight": (codes * scale).to(dtype)}
    return {"weight": codes.to(dtype), "scale": scale.reshape(-1)}


def prepare(layer: Layer, dtype: torch.dtype, keep: bool) -> Made:
    return decoded(layer, dtype) if keep else {}


def run(layer: Layer, x: Tensor, made: Made, dtype: torch.dtype) -> Tensor:
    met, rounded = rounded_once(layer, x, _rounded, dtype)
    weight = made or decoded(layer, dtype)
    y = torch.nn.functional.linear(rounded, weight["weight"])
    if "scale" in weight:
        y = (y * weight["scale"]).to(dtype)
    return finished(layer, y, met, rounded, dtype)


def _rounded(layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    return on_grid(layer, x).to(dtype)


def on_grid(layer: Layer, x: Tensor) -> Tensor:
    """The transformed input rounded as the scheme says."""
    spec, stored = layer.scheme.activation, layer.stored_tensors()
    if spec.mode == "none":
        return x
    scale = stored["input_scale"] if spec.mode == "static" else None
    zero = stored["input_zero"] if spec.mode == "static" and not spec.symmetric else None
    return fake_quantize(x, spec, scale, zero)
