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
from collections.abc import Iterator

import torch
from torch import Tensor

from ..activation import quantize_token, quantize_token_asymmetric
from ..fused import Fused
from ..scheme import Scheme
from ._integers import integers
from ._integers import prepare as prepare
from ._normed import Normed
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
    """The output (..., out): the product of codes, and the low-rank part in floating point."""
    met, rounded = rounded_once(layer, x, _tokens, dtype)
    flat, scales, zeros = rounded
    shape, rank = torch.Size((1, len(flat), layer.out_features)), layer.scheme.rank
    y = computed(layer, made, rounded, shape, torch.float32 if rank else dtype)
    y = y.reshape(*x.shape[:-1], layer.out_features)
    if not rank:
        return y
    values = flat.float() * scales if zeros is None else (flat.float() - zeros) * scales
    return finished(layer, y, met, values.reshape(x.shape), dtype)


def puts_off(layer: Layer, device: torch.device) -> bool:
    """Whether what stands around a layer can be done while its tokens are rounded and its sums are scaled."""
    return not layer.scheme.rank


def rounded(layer: Layer, x: Tensor | Normed) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (tokens, in), scales and zeros (tokens, 1); norm and modulation in the same loop where nothing comes
    between them and the rounding."""
    scheme = layer.scheme
    spec = scheme.activation
    if not isinstance(x, Normed) or scheme.smooth == "online" or scheme.rotate:
        values = x.compute() if isinstance(x, Normed) else x
        found: tuple[Tensor, Tensor, Tensor | None] = rounded_once(layer, values, _tokens, values.dtype)[1]
        return found
    vectors = [None if v is None else v.contiguous() for v in (x.scale, x.shift)]  # of one kind to the compiler
    made = _normalized(x.x, x.kind, x.eps, *vectors, spec.bits, spec.symmetric)
    return (*made, None) if spec.symmetric else made


def computed(
    layer: Layer, made: Made, rounded: tuple[Tensor, Tensor, Tensor | None], shape: torch.Size, dtype: torch.dtype,
    activation: str | None = None, residual: Tensor | None = None, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + gate * activation(product), (B, T, out); the bias too, unless a low-rank part comes before it.

    Some columns at a time: their weights are decoded while they are in the cache, memory holds one such part, and the
    sums of some tokens are finished before the next ones' (a traced graph fuses that)."""
    flat, scales, zeros = rounded
    bias = None if layer.scheme.rank else layer.bias
    gate = None if gate is None else gate.expand(shape[0], 1, -1).contiguous()  # of one kind to the compiler
    size, y = _columns(layer.out_features, PART), torch.empty(shape, dtype=dtype, device=flat.device)
    for start in range(0, layer.out_features, size):
        own = slice(start, min(start + size, layer.out_features))
        if "codes" in made:
            weight, weight_scale = made["codes"][own], made["scale"][own]
        else:
            weight, weight_scale = layer.as_int8(own.start, own.stop)
        row_sum = None if zeros is None else made["row_sum"][own]
        for samples, tokens, some in _pieces(*shape[:2]):
            here = (samples, tokens, own)
            out = y[here]
            each = (*out.shape[:2], 1)
            _scaled(
                integer_product(flat[some], weight).view(out.shape), scales[some].view(each), weight_scale.reshape(-1),
                None if zeros is None else zeros[some].view(each), row_sum, None if bias is None else bias[own],
                activation, None if gate is None else gate[samples, :, own],
                None if residual is None else residual[here], out,
            )  # fmt: skip
    return y


def _pieces(samples: int, tokens: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of (samples, tokens) of about TOKENS, and the rows that they are: whole samples, or a part of one."""
    if torch.compiler.is_compiling() or samples * tokens <= TOKENS:
        yield slice(0, samples), slice(0, tokens), slice(0, samples * tokens)
        return
    many = max(1, TOKENS // tokens)
    for first in range(0, samples, many):
        last = min(first + many, samples)
        for start in range(0, tokens, TOKENS):
            end = min(start + TOKENS, tokens)
            yield slice(first, last), slice(start, end), slice(first * tokens + start, (last - 1) * tokens + end)


def _columns(out: int, most: int) -> int:
    """Columns at a time, at most `most`: parts of nearly equal size, in whole vectors of 16."""
    parts = -(-out // most)
    return -(-out // (16 * parts)) * 16


def _scale(
    sums: Tensor, scale: Tensor, weight_scale: Tensor, zero: Tensor | None, row_sum: Tensor | None, bias: Tensor | None,
    activation: str | None, gate: Tensor | None, residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """`out` (B, T, out) from the int32 sums of codes; every step in float32."""
    y = sums.float()
    if zero is not None:
        y = y.addcmul_(zero, row_sum, value=-1)  # type: ignore[arg-type]
    y = y.mul_(scale).mul_(weight_scale)
    y = y if bias is None else y.add_(bias.float())
    y = _activated(y, activation)
    y = y if gate is None else y.mul_(gate.float())
    out.copy_(y if residual is None else y.add_(residual.float()))


def _activated(y: Tensor, name: str | None) -> Tensor:
    if name == "gelu_tanh" and torch.compiler.is_compiling():  # the same function with a third of the work of tanh
        return y / (1 + torch.exp2(-2.302208198 * (y + 0.044715 * y * y * y)))
    if name is None:
        return y
    F = torch.nn.functional
    return F.silu(y) if name == "silu" else F.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")


def _norm(
    x: Tensor, kind: str, eps: float, scale: Tensor | None, shift: Tensor | None, bits: int, symmetric: bool
) -> tuple[Tensor, ...]:
    """Rounded tokens of norm(x) * scale + shift."""
    x = x.float() if torch.compiler.is_compiling() else x  # in one loop that costs nothing
    F, width = torch.nn.functional, x.shape[-1:]
    y = F.layer_norm(x, width, eps=eps) if kind == "layer" else F.rms_norm(x, width, eps=eps)
    y = y if scale is None else y * scale
    y = (y if shift is None else y + shift).reshape(-1, *width)
    return quantize_token(y, bits) if symmetric else quantize_token_asymmetric(y, bits)


_scaled, _symmetric, _asymmetric = Fused(_scale), Fused(quantize_token), Fused(quantize_token_asymmetric)
_normalized = Fused(_norm)


def _tokens(layer: Layer, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (tokens, in), scales and zeros (tokens, 1) of x (..., in): two dimensions always, or each number of them
    would be compiled for itself."""
    spec, x = layer.scheme.activation, x.reshape(-1, layer.in_features)
    return (*_symmetric(x, spec.bits), None) if spec.symmetric else _asymmetric(x, spec.bits)
