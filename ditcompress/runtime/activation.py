"""Quantization of a linear's input: the one place that fixes scales, zeros and rounding.

x: (..., in) float. Symmetric: scale = amax / (2^(b-1) - 1), codes within +-(2^(b-1) - 1). Asymmetric:
scale = (max - min) / (2^b - 1) over a range that contains 0, integer zero. Per-tensor asymmetric is DiTAS's rule
(scale = (max - min) / 2^b, no demand on 0), kept because its recipe is faithful.

With `group`, every run of that many channels of a token has its own scale; a last run may be shorter. Small floats
(`element`) take scale = amax / largest value, rounded as `scale` says: "e8m0" by the rule of OCP MX v1.0 (5.1: the
exponent of amax minus that of the largest value), "e4m3" as NVFP4: E4M3 times the token's own float32 scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import _floats
from ..plan import ActivationSpec

TINY = 1e-12  # scale of an all-zero token
PART = 2**19  # elements that are quantized at a time: what stays in the caches


def token_scale(x: Tensor, bits: int) -> Tensor:
    """Symmetric scale of each token, (..., 1) float32."""
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # no copy of x, as abs would make
    return (largest.float() / (2 ** (bits - 1) - 1)).clamp_min(TINY)


def quantize_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes int8 (..., in) and scale float32 (..., 1)."""
    top = 2 ** (bits - 1) - 1

    def some(x: Tensor) -> tuple[Tensor, ...]:
        scale = token_scale(x, bits)
        return torch.div(x, scale).round_().clamp_(-top, top).to(torch.int8), scale

    codes, scale = _in_parts(some, x)
    return codes, scale


def quantize_token_asymmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes shifted to signed int8 (..., in), scale (..., 1) and zero (..., 1) of the shifted codes, both float32:
    x ~ scale * (code - zero)."""
    levels, half = 2**bits - 1, 2 ** (bits - 1)

    def some(x: Tensor) -> tuple[Tensor, ...]:
        low, high = x.amin(-1, keepdim=True).float().clamp_max(0), x.amax(-1, keepdim=True).float().clamp_min(0)
        scale = ((high - low) / levels).clamp_min(TINY)
        zero = torch.round(-low / scale)
        codes = torch.div(x, scale).round_().add_(zero).clamp_(0, levels).sub_(half).to(torch.int8)
        return codes, scale, zero - half

    codes, scale, zero = _in_parts(some, x)
    return codes, scale, zero


def _in_parts(quantize: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """`quantize` of some tokens at a time, joined: on CPU the passes over a part stay in the cache (10 times faster on
    large inputs). A traced graph has its passes fused and takes all at once."""
    rows = max(1, PART // x.shape[-1])
    if x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling() or x.numel() <= rows * x.shape[-1]:
        return quantize(x)
    flat = x.reshape(-1, x.shape[-1])
    made: tuple[Tensor, ...] = ()
    for start in range(0, len(flat), rows):
        found = quantize(flat[start : start + rows])
        made = made or tuple(part.new_empty(len(flat), part.shape[-1]) for part in found)
        for whole, part in zip(made, found, strict=True):
            whole[start : start + rows] = part
    return tuple(whole.reshape(*x.shape[:-1], -1) for whole in made)


def fake_quantize(x: Tensor, spec: ActivationSpec, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """x rounded to its grid, float32. `scale`, `zero`: the calibrated ones of mode "static"."""
    if spec.mode == "none":
        return x.float()
    if spec.mode == "static":
        return _static(x.float(), spec, scale, zero)
    if spec.mode == "token" and (spec.group or spec.element != "int"):
        return _grouped(x.float(), spec)
    if spec.mode == "token":
        if spec.symmetric:
            codes, step = quantize_token(x, spec.bits)
            return codes.float() * step
        codes, step, shift = quantize_token_asymmetric(x, spec.bits)
        return (codes.float() - shift) * step
    return _per_tensor(x.float(), spec)


def _grouped(x: Tensor, spec: ActivationSpec) -> Tensor:
    """Tokens in groups of channels, integers or small floats."""
    width = x.shape[-1]
    group = min(spec.group or width, width)
    padded = torch.nn.functional.pad(x, (0, -width % group))
    parts = padded.reshape(*x.shape[:-1], -1, group)
    if spec.element != "int":
        parts = _small_float(parts, spec)
    elif spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = (parts.abs().amax(-1, keepdim=True) / top).clamp_min(TINY)
        scale = rounded_scale(scale, spec.scale, top)
        parts = torch.round(parts / scale).clamp_(-top, top) * scale
    else:
        low, high = parts.amin(-1, keepdim=True).clamp_max_(0), parts.amax(-1, keepdim=True).clamp_min_(0)
        scale = ((high - low) / (2**spec.bits - 1)).clamp_min(TINY)
        zero = torch.round(-low / scale)
        parts = ((torch.round(parts / scale) + zero).clamp_(0, 2**spec.bits - 1) - zero) * scale
    return parts.reshape(padded.shape)[..., :width]


def _small_float(parts: Tensor, spec: ActivationSpec) -> Tensor:
    top = _floats.largest(spec.element)
    scale = rounded_scale((parts.abs().amax(-1, keepdim=True) / top).clamp_min(TINY), spec.scale, top)
    return _floats.nearest(parts / scale, spec.element) * scale


def rounded_scale(scale: Tensor, kind: str, top: float) -> Tensor:
    """Scales (..., groups, 1) as a format stores them; `top` is the largest code that they multiply."""
    if kind == "e8m0":
        spare = torch.log2(torch.tensor(top)).floor()
        return torch.exp2((torch.log2(scale * top).floor() - spare).clamp(-127, 127))
    if kind == "e4m3":
        outer = (scale.amax(-2, keepdim=True) / _floats.largest("e4m3")).clamp_min(TINY)
        return _floats.nearest(scale / outer, "e4m3").clamp_min(2.0**-9) * outer
    return scale


def _static(x: Tensor, spec: ActivationSpec, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    assert scale is not None
    if zero is None:
        top = 2 ** (spec.bits - 1) - 1
        return torch.round(x / scale).clamp(-top, top) * scale
    return ((torch.round(x / scale) + zero).clamp(0, 2**spec.bits - 1) - zero) * scale


def _per_tensor(x: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = (x.abs().max() / top).clamp_min(TINY)
        return torch.round(x / scale).clamp(-top, top) * scale
    scale = ((x.max() - x.min()) / 2**spec.bits).clamp_min(TINY)
    zero = torch.round(-x.min() / scale)
    return ((torch.round(x / scale) + zero).clamp(0, 2**spec.bits - 1) - zero) * scale
