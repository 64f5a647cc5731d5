"""INT8 tokens times weights that are INT8 with one scale a row, on CPU: an integer product with exact int32 sums.

`torch._int_mm`, which oneDNN serves. Scales are applied in float32 afterwards; an asymmetric token adds a rank-1 term
with the row sums of the weight codes. Two traps decide where it may be used (measured on torch 2.13, 1 thread):

* Without VNNI instructions oneDNN adds pairs of products in 16 bits, which saturate: outputs are off by 1 to 3 %,
  as much as the quantization itself. So the product is tried on saturating codes before it is trusted.
* Without oneDNN a plain loop does the work: exact, 27 times slower than float32.

oneDNN's prepacked product (`qlinear_pointwise`) is exact too, and faster with AMX (up to 1.6 times), but on a CPU that
has VNNI and no AMX it took seconds where this takes milliseconds, so it is not used.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..activation import quantize_token, quantize_token_asymmetric
from ..fused import Fused
from ..scheme import Scheme
from ._integers import integers
from ._integers import prepare as prepare
from ._shared import rounded_once
from .base import Layer, Made, finished

SAYS = "integer product of INT8 tokens and INT8 weights (oneDNN)"
# Rows of a weight, and tokens, at a time: decoded rows stay in the caches, and above 32 MB of sums glibc asks the
# system for new pages at every call, which takes as long again.
PART, TOKENS = 2048, 2048
# (tokens, in, out): oneDNN picks its kernel by shape; one token and several, whole and ragged tiles
_TRIED = ((1, 64, 16), (5, 67, 19), (64, 256, 64))


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this machine has a fast integer product that adds exactly."""
    return hasattr(torch, "_int_mm") and bool(torch.backends.mkldnn.enabled) and _with_onednn()


@functools.cache
def _with_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and adds_exactly()


def adds_exactly() -> bool:
    """Whether the integer product is right for the codes that overflow 16-bit sums of pairs."""
    for tokens, columns, rows in _TRIED:
        for code in (127, -128):
            codes = torch.full((tokens, columns), code, dtype=torch.int8, device="cpu")
            weight = torch.full((rows, columns), 127, dtype=torch.int8, device="cpu")
            weight[1::2] = -127
            exact = codes.double() @ weight.double().t()
            if not torch.equal(integer_product(codes, weight).double(), exact):
                return False
    return True


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (tokens, in) int8 times weight (out, in) int8, transposed: (tokens, out) int32, exact where `available`."""
    return torch._int_mm(codes.contiguous(), weight.t())


def supports(scheme: Scheme, device: str) -> bool:
    """Integers on both sides, and a CPU that adds exactly."""
    return device == "cpu" and integers(scheme) and available()


def run(layer: Layer, x: Tensor, made: Made, dtype: torch.dtype) -> Tensor:
    """The output (..., out), some columns at a time: their weights are decoded while they are in the cache, memory
    holds one such part, and the sums of some tokens are scaled before the next ones' (a traced graph fuses that)."""
    shape = x.shape
    met, (flat, scales, zeros) = rounded_once(layer, x, _tokens, dtype)
    tokens = max(1, len(flat)) if torch.compiler.is_compiling() else TOKENS
    size = _columns(layer.out_features, PART)
    rank, bias = layer.scheme.rank, layer.bias
    y = torch.empty(len(flat), layer.out_features, dtype=torch.float32 if rank else dtype, device=x.device)
    for start in range(0, layer.out_features, size):
        own = slice(start, min(start + size, layer.out_features))
        if "codes" in made:
            weight, weight_scale = made["codes"][own], made["scale"][own]
        else:
            weight, weight_scale = layer.as_int8(own.start, own.stop)
        row_sum = None if zeros is None else made["row_sum"][own]
        for first in range(0, len(flat), tokens):
            some = slice(first, first + tokens)
            _scaled(
                integer_product(flat[some], weight), scales[some], weight_scale.reshape(-1),
                None if zeros is None else zeros[some], row_sum, None if bias is None or rank else bias[own],
                y[some, own],
            )  # fmt: skip
    y = y.reshape(*shape[:-1], layer.out_features)
    if not rank:
        return y
    rounded = flat.float() * scales if zeros is None else (flat.float() - zeros) * scales
    return finished(layer, y, met, rounded.reshape(shape), dtype)


def _columns(out: int, most: int) -> int:
    """Columns at a time, at most `most`: parts of nearly equal size, in whole vectors of 16."""
    parts = -(-out // most)
    return -(-out // (16 * parts)) * 16


def _scale(
    sums: Tensor, scale: Tensor, weight_scale: Tensor, zero: Tensor | None, row_sum: Tensor | None, bias: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """`out` (tokens, out) from the int32 sums of codes; every step in float32."""
    y = sums.float()
    if zero is not None:
        y = y.addcmul_(zero, row_sum, value=-1)  # type: ignore[arg-type]
    y = y.mul_(scale).mul_(weight_scale)
    out.copy_(y if bias is None else y.add_(bias.float()))


_scaled, _symmetric, _asymmetric = Fused(_scale), Fused(quantize_token), Fused(quantize_token_asymmetric)


def _tokens(layer: Layer, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (tokens, in), scales and zeros (tokens, 1) of x (..., in): two dimensions always, or each number of them
    would be compiled for itself."""
    spec, x = layer.scheme.activation, x.reshape(-1, layer.in_features)
    return (*_symmetric(x, spec.bits), None) if spec.symmetric else _asymmetric(x, spec.bits)
