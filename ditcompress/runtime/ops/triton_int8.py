"""INT8 tokens times weights that are INT8 with one scale a row, on a GPU: two Triton kernels a linear.

One pass smooths, rotates and rounds the tokens; the product scales its sums, subtracts the zero points' share, adds the
low-rank part and the bias while they are in registers. Correct in Triton's interpreter; not yet timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scheme import Scheme
from . import reference
from ._integers import integers
from ._integers import prepare as prepare
from ._normed import Normed, rows
from .base import Layer, Made
from .triton import available, expected

SAYS = "tokens rounded in one pass, integer product with everything after it fused (Triton)"


def supports(scheme: Scheme, device: str) -> bool:
    """Integers on both sides, and a GPU that Triton compiles for."""
    return device == "cuda" and integers(scheme) and expected()


def fits(layer: Layer, device: torch.device) -> bool:
    """Whether the kernels run this layer on this device: rows up to 16384, ranks up to theirs."""
    if not available(device):
        return False
    from .triton import rows as kernel
    from .triton.int8_gemm import MOST_RANK

    return layer.scheme.rank <= MOST_RANK and kernel.supported(layer.in_features, 0, device)


def apart(layer: Layer, device: torch.device) -> bool:
    """Whether the input is smoothed and rotated outside the kernels: for a low-rank part of the float input, and where
    the transform is one that they lack."""
    from .triton import rows as kernel

    floats = bool(layer.scheme.rank) and layer.scheme.low_rank_input == "float"
    return floats or not kernel.supported(layer.in_features, layer.scheme.rotate, device)


def run(layer: Layer, x: Tensor, made: Made, dtype: torch.dtype) -> Tensor:
    """As `reference`, but for the order of float32 sums and codes at ties. What does not fit the kernels is done
    outside them."""
    if not fits(layer, x.device):
        return reference.run(layer, x, {}, dtype)
    from .triton import library

    scheme, stored = layer.scheme, layer.stored_tensors()
    sign = layer.signs() if scheme.rotate else None
    smooth, rotate = stored.get("smooth"), scheme.rotate
    outside = scheme.rank and scheme.low_rank_input == "float"
    if apart(layer, x.device):
        x, sign, smooth, rotate = layer.transformed(x), None, None, 0
    inner = stored["low_rank_down"] if scheme.rank and not outside else None
    codes, scale, zero, down, _ = library.quantize_rows(
        x, smooth=smooth, sign=sign, rotate=rotate, down=inner, bits=scheme.activation.bits,
        symmetric=scheme.activation.symmetric,
    )  # fmt: skip
    if outside:
        flat = x.reshape(-1, x.shape[-1])
        down = torch.nn.functional.linear(flat, stored["low_rank_down"].to(flat.dtype)).float()
    weight, weight_scale = weight_of(layer, made)
    y = library.product(
        codes, scale, weight, weight_scale, made.get("row_sum"), layer.bias, stored.get("low_rank_up"),
        None if scheme.activation.symmetric else zero, down if scheme.rank else None, dtype=dtype,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], layer.out_features)


def puts_off(layer: Layer, device: torch.device) -> bool:
    """Whether what stands around a layer can be done inside its kernels."""
    return fits(layer, device) and not apart(layer, device)


def rounded(layer: Layer, x: Tensor | Normed) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (M, K) int8, scale and zero (M, 1) of tokens that are normalized, transformed and rounded in one pass."""
    from .triton import rows as kernel

    scheme = layer.scheme
    around: dict[str, Any] = {}
    if isinstance(x, Normed):
        around = {"norm": x.kind, "eps": x.eps, "scale": rows(x.scale, len(x.x)), "shift": rows(x.shift, len(x.x))}
    found = kernel.quantize_rows(
        x.x if isinstance(x, Normed) else x, smooth=layer.stored_tensors().get("smooth"), one=0.0,
        sign=layer.signs() if scheme.rotate else None, rotate=scheme.rotate, bits=scheme.activation.bits,
        symmetric=scheme.activation.symmetric, **around,
    )  # fmt: skip
    return found.codes, found.scale, None if scheme.activation.symmetric else found.zero


def computed(
    layer: Layer, made: Made, rounded: tuple[Tensor, Tensor, Tensor | None], shape: torch.Size, dtype: torch.dtype,
    activation: str | None, residual: Tensor | None, gate: Tensor | None,
) -> Tensor:  # fmt: skip
    """residual + gate * activation(product) in one launch, (B, T, N)."""
    from .triton import int8_gemm
    from .triton import rows as kernel

    stored, (codes, scale, zero) = layer.stored_tensors(), rounded
    down = kernel.down_of_codes(codes, scale, zero, stored["low_rank_down"]) if layer.scheme.rank else None
    weight = int8_gemm.Weight(
        *weight_of(layer, made), made.get("row_sum"), layer.bias, stored.get("low_rank_up")
    )  # fmt: skip
    return int8_gemm.product(
        codes, scale, weight, zero=zero, down=down, activation=activation, gate=rows(gate, shape[0]), dtype=dtype,
        residual=None if residual is None else residual.reshape(-1, shape[-1]),
    ).view(shape)  # fmt: skip


def weight_of(layer: Layer, made: Made) -> tuple[Tensor, Tensor]:
    """INT8 codes (out, in) and scales (out, 1)."""
    return (made["codes"], made["scale"]) if "codes" in made else layer.as_int8()
