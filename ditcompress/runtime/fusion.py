"""What stands around a product on a GPU, done inside the two kernels of the product.

Norm, modulation, activation, gate and residual are each a pass over memory between the products of a block. With
`set_fusion` they are put off: a norm and an integer product return a tensor that is not computed yet, the operations
that the kernels can do are noted on it, and whoever needs its numbers has them computed in one go. Blocks of diffusers
stay as they are written:

    norm(x) * (1 + scale) + shift    read by packed linears: in the pass that rounds their input, once for q, k and v
    gelu(linear(x))                  in the product's epilogue
    residual + gate * linear(x)      in the product's epilogue

Any other operation meets ordinary numbers, those of the operations one by one. Inside the kernels values are float32,
where one by one they are rounded to the model's dtype after each. For eager mode and CUDA graphs; torch.compile fuses
by itself what is around the operators, and gradients take the ordinary way.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .ops import triton_int8
from .ops._shared import DECIDING
from .ops.base import Made
from .ops.triton import available

if TYPE_CHECKING:
    from .linear import PackedLinear

NORMS = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms"}  # classes of torch and diffusers
KERNEL = "triton_int8"


@dataclass(frozen=True)
class Normed:
    """norm(x) * scale + shift of x (B, T, K), scale and shift (B or 1, 1, K); `read` holds its rounded forms."""

    norm: nn.Module
    x: Tensor
    dtype: torch.dtype
    version: int
    scale: Tensor | None = None
    shift: Tensor | None = None
    read: dict[str, Any] = field(default_factory=dict)

    def compute(self) -> Tensor:
        self.check()
        y: Tensor = type(self.norm).forward(self.norm, self.x)
        y = y if self.scale is None else y * self.scale
        return (y if self.shift is None else y + self.shift).to(self.dtype)

    def check(self) -> None:
        if self.x._version != self.version:
            raise RuntimeError(
                "the input of a norm was changed before its output was read: use set_fusion(model, False)"
            )

    def rounded(self, layer: PackedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
        self.check()
        assert layer.rounding is not None
        if layer.rounding not in self.read:
            vectors = [None if v is None else _rows(v, len(self.x)) for v in (self.scale, self.shift)]
            kind, eps = NORMS[type(self.norm).__name__], getattr(self.norm, "eps", None)
            eps = torch.finfo(self.x.dtype).eps if eps is None else eps  # as torch's RMSNorm
            self.read[layer.rounding] = _rounded(
                layer, self.x, norm=kind, eps=eps, scale=vectors[0], shift=vectors[1], one=0.0
            )
        found: tuple[Tensor, Tensor, Tensor | None] = self.read[layer.rounding]
        return found


@dataclass(frozen=True)
class Product:
    """gate * activation(layer(x)) (B, T, N) of an input that is rounded already; gate (B or 1, 1, N)."""

    layer: PackedLinear
    made: Made
    rounded: tuple[Tensor, Tensor, Tensor | None]
    shape: torch.Size
    dtype: torch.dtype
    activation: str | None = None
    gate: Tensor | None = None

    def compute(self, residual: Tensor | None = None) -> Tensor:
        from .ops.triton import int8_gemm, rows

        stored, (codes, scale, zero), width = self.layer.stored_tensors(), self.rounded, self.shape[-1]
        down = rows.down_of_codes(codes, scale, zero, stored["low_rank_down"]) if self.layer.scheme.rank else None
        weight = int8_gemm.Weight(
            *triton_int8.weight_of(self.layer, self.made), self.made.get("row_sum"), self.layer.bias,
            stored.get("low_rank_up"),
        )  # fmt: skip
        last = residual is not None and self.gate is not None
        y = int8_gemm.product(
            codes, scale, weight, zero=zero, down=down, activation=self.activation, dtype=self.dtype,
            residual=None if residual is None else residual.reshape(-1, width),
            gate=_rows(self.gate, self.shape[0]) if last and self.gate is not None else None,
        ).view(self.shape)  # fmt: skip
        return y if self.gate is None or last else y * self.gate


class Deferred(Tensor):
    """A tensor that is computed when its numbers are asked for."""

    work: Normed | Product
    value: Tensor | None

    @staticmethod
    def __new__(cls, work: Normed | Product, shape: torch.Size, device: torch.device) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=work.dtype, device=device)  # type: ignore[attr-defined]
        made.work, made.value = work, None
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def plain(self) -> Tensor:
        """Its numbers."""
        if self.value is None:
            self.value = self.work.compute()
        return self.value

    def noted(self, **what: Any) -> Deferred:
        """The same with one more operation."""
        if isinstance(self.work, Normed):
            what["read"] = {}
        return Deferred(replace(self.work, **what), self.shape, self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = _RULES[func](*args, **kwargs) if func in _RULES else NotImplemented
        return cls._plainly(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls._plainly(func, args, kwargs or {})

    @staticmethod
    def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Deferred, Deferred.plain, (args, kwargs))
        return func(*args, **kwargs)


# --- what is noted ----------------------------------------------------------------------------------------------------


def _normed(x: Any) -> Normed | None:
    """The work of a norm that is still put off."""
    return x.work if isinstance(x, Deferred) and x.value is None and isinstance(x.work, Normed) else None


def _product(x: Any) -> Product | None:
    """The work of a product that is still put off."""
    return x.work if isinstance(x, Deferred) and x.value is None and isinstance(x.work, Product) else None


def _vector(v: Any, x: Deferred) -> bool:
    """Whether v is one row for each sample of x, and of a dtype that leaves the result's."""
    return (
        isinstance(v, Tensor) and not isinstance(v, Deferred) and v.dtype == x.dtype and v.dim() == x.dim() == 3
        and v.shape[0] in (1, x.shape[0]) and v.shape[1:] == (1, x.shape[2])
    )  # fmt: skip


def _times(a: Any, b: Any) -> Any:
    x, v = (a, b) if isinstance(a, Deferred) else (b, a)
    if isinstance(v, (int, float)) and v == 1:
        return x
    norm, last = _normed(x), _product(x)
    if not _vector(v, x):
        return NotImplemented
    if norm and norm.scale is None and norm.shift is None:
        return x.noted(scale=v)
    return x.noted(gate=v) if last and last.gate is None else NotImplemented


def _plus(a: Any, b: Any, *, alpha: float = 1) -> Any:
    x, v = (a, b) if isinstance(a, Deferred) else (b, a)
    norm, last = _normed(x), _product(x)
    if alpha != 1:
        return NotImplemented
    if norm and norm.shift is None and _vector(v, x):
        return x.noted(shift=v)
    v = plain(v)
    same = isinstance(v, Tensor) and (v.shape, v.dtype) == (x.shape, x.dtype)
    return last.compute(v) if last and same else NotImplemented


def _divided(x: Any, by: Any) -> Any:
    return x if isinstance(by, (int, float)) and by == 1 else NotImplemented


def _activated(name: str) -> Callable[..., Any]:
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        last = _product(x)
        return x.noted(activation=name) if last and last.activation is None and last.gate is None else NotImplemented

    return rule


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    return _activated({"none": "gelu", "tanh": "gelu_tanh"}[approximate])(x)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else x


def _to(x: Any, dtype: Any, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    if dtype == x.dtype:
        return x
    return x.noted(dtype=dtype) if _normed(x) else NotImplemented


def _type_as(x: Any, other: Tensor) -> Any:
    return _to(x, other.dtype) if isinstance(x, Deferred) and other.device == x.device else NotImplemented


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.mul: _times, torch.mul: _times, Tensor.add: _plus, torch.add: _plus, Tensor.div: _divided,
    torch.nn.functional.gelu: _gelu, torch.nn.functional.silu: _activated("silu"),
    torch.nn.functional.dropout: _dropout, Tensor.to: _to, Tensor.type_as: _type_as,
}  # fmt: skip
_ABOUT = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")}
_ABOUT |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_inference}


# --- who puts off -----------------------------------------------------------------------------------------------------


def set_fusion(model: nn.Module, on: bool = True) -> nn.Module:
    """Whether norms and integer products of a loaded model are put off on a GPU, to be computed together with what
    surrounds them; the model itself. Call it again after loading other weights."""
    for module in model.modules():
        if hasattr(module, "rounding"):
            module.rounding = _digest(module) if on else None  # type: ignore[arg-type,assignment]
        elif type(module).__name__ in NORMS and _plain_norm(module):
            module.__dict__.pop("forward", None)
            if on:
                module.forward = functools.partial(_norm, module)
    return model


def fusible(model: nn.Module) -> bool:
    """Whether `set_fusion` changes how a model runs where it lies."""
    layers = [module for module in model.modules() if hasattr(module, "rounding")]
    return any(m.kernel(m.qweight.device.type) == KERNEL and triton_int8.fits(m, m.qweight.device) for m in layers)  # type: ignore


def _plain_norm(norm: nn.Module) -> bool:
    """Of the last dimension, without weights."""
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", ())
    return len(shape) == 1 and getattr(norm, "weight", None) is None and getattr(norm, "bias", None) is None


def _digest(layer: PackedLinear) -> str:
    """Equal for linears that transform and round an input alike."""
    stored, digest = layer.stored_tensors(), hashlib.sha256()
    digest.update(repr((layer.scheme.activation, layer.scheme.smooth, layer.scheme.rotate)).encode())
    for name in DECIDING:
        if name in stored:
            digest.update(name.encode() + stored[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _norm(norm: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or isinstance(x, Deferred) or x.dim() != 3 or not _possible(x) or not available(x.device):
        result: Tensor = type(norm).forward(norm, x, *args, **kwargs)
        return result
    return Deferred(Normed(norm, x, x.dtype, x._version), x.shape, x.device)


def _possible(x: Tensor) -> bool:
    """Whether operations on x may be put off at all."""
    grads = torch.is_grad_enabled() and x.requires_grad
    return not (torch.compiler.is_compiling() or grads or x.is_inference() or torch.is_autocast_enabled(x.device.type))


def product(layer: PackedLinear, x: Tensor) -> Tensor | None:
    """The layer's output, not computed yet; None where it has to be computed the ordinary way, of the plain x."""
    scheme, device = layer.scheme, x.device
    if not _possible(x) or layer.kernel(device.type) != KERNEL or scheme.output_norm or x.dim() != 3:
        return None
    if not triton_int8.fits(layer, device) or triton_int8.apart(layer, device):
        return None
    norm = _normed(x)
    rounded = _rounded(layer, plain(x)) if norm is None else norm.rounded(layer)
    shape = torch.Size((*x.shape[:-1], layer.out_features))
    return Deferred(Product(layer, layer._prepared(KERNEL, x.dtype), rounded, shape, x.dtype), shape, device)


def plain(x: Any) -> Any:
    """x with its numbers."""
    return x.plain() if isinstance(x, Deferred) else x


def _rounded(layer: PackedLinear, x: Tensor, **around: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (M, K) int8, scale and zero (M, 1) of rows that are normalized, transformed and rounded in one pass."""
    from .ops.triton import rows

    scheme, stored = layer.scheme, layer.stored_tensors()
    found = rows.quantize_rows(
        x, smooth=stored.get("smooth"), sign=layer.signs() if scheme.rotate else None, rotate=scheme.rotate,
        bits=scheme.activation.bits, symmetric=scheme.activation.symmetric, **around,
    )  # fmt: skip
    return found.codes, found.scale, None if scheme.activation.symmetric else found.zero


def _rows(v: Tensor, count: int) -> Tensor:
    """A vector for each sample, (B or 1, 1, K) to (B, K)."""
    return v.expand(count, 1, v.shape[-1]).reshape(count, -1)
