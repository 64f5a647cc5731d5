"""INT8 tokens times weights that are INT8 with one scale a row, on a GPU: two Triton kernels a linear.

One pass smooths, rotates and rounds the tokens; the product scales its sums, subtracts the zero points' share, adds the
low-rank part and the bias while they are in registers. Correct in Triton's interpreter; not yet timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from . import reference
from ._integers import integers
from ._integers import prepare as prepare
from .base import Layer, Made
from .triton import available, expected

SAYS = "tokens rounded in one pass, integer product with everything after it fused (Triton)"


def supports(scheme: Scheme, device: str) -> bool:
    """Integers on both sides, and a GPU that Triton compiles for."""
    return device == "cuda" and integers(scheme) and expected()


def run(layer: Layer, x: Tensor, made: Made, dtype: torch.dtype) -> Tensor:
    """As `reference`, but for the order of float32 sums and codes at ties. What does not fit the kernels (a row above
    16384, an uncommon transform, a rank above theirs) is done outside them."""
    if not available(x.device):
        return reference.run(layer, x, {}, dtype)
    from .triton import library, rows
    from .triton.int8_gemm import MOST_RANK

    scheme, stored = layer.scheme, layer.stored_tensors()
    if scheme.rank > MOST_RANK or not rows.supported(layer.in_features, 0, x.device):
        return reference.run(layer, x, {}, dtype)
    sign = layer.signs() if scheme.rotate else None
    smooth, rotate = stored.get("smooth"), scheme.rotate
    outside = scheme.rank and scheme.low_rank_input == "float"
    if outside or not rows.supported(layer.in_features, rotate, x.device):
        x, sign, smooth, rotate = layer.transformed(x), None, None, 0
    inner = stored["low_rank_down"] if scheme.rank and not outside else None
    codes, scale, zero, down, _ = library.quantize_rows(
        x, smooth=smooth, sign=sign, rotate=rotate, down=inner, bits=scheme.activation.bits,
        symmetric=scheme.activation.symmetric,
    )  # fmt: skip
    if outside:
        flat = x.reshape(-1, x.shape[-1])
        down = torch.nn.functional.linear(flat, stored["low_rank_down"].to(flat.dtype)).float()
    weight, weight_scale = (made["codes"], made["scale"]) if "codes" in made else layer.as_int8()
    y = library.product(
        codes, scale, weight, weight_scale, made.get("row_sum"), layer.bias, stored.get("low_rank_up"),
        None if scheme.activation.symmetric else zero, down if scheme.rank else None, dtype=dtype,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], layer.out_features)
