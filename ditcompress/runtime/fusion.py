"""What stands around an integer product, done inside the two kernels of the product.

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

A kernel that takes part exports beside what `ops/base.py` asks for

    puts_off(layer, device) -> bool
    rounded(layer, x) -> anything        of a tensor (B, T, K) or a `Normed`
    computed(layer, made, rounded, shape, dtype, activation, residual, gate) -> Tensor
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .kernels import KERNELS
from .ops._normed import NORMS, Normed
from .ops._shared import DECIDING

if TYPE_CHECKING:
    from .linear import PackedLinear


@dataclass(frozen=True)
class Product:
    """gate * activation(layer(x)) (B, T, N) of an input that is rounded already; gate (B or 1, 1, N)."""

    layer: PackedLinear
    kernel: str
    rounded: Any
    shape: torch.Size
    dtype: torch.dtype
    activation: str | None = None
    gate: Tensor | None = None

    def compute(self, residual: Tensor | None = None) -> Tensor:
        made = self.layer._prepared(self.kernel, self.dtype)
        gate = None if residual is None else self.gate  # alone it is no kernel's
        y: Tensor = KERNELS[self.kernel].computed(
            self.layer, made, self.rounded, self.shape, self.dtype, self.activation, residual, gate
        )
        return y if self.gate is None or residual is not None else y * self.gate


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
            _check(self.work)
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
    """Whether norms and integer products of a loaded model are put off, to be computed together with what surrounds
    them; the model itself. Call it again after loading other weights."""
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
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "rounding")]
    return any(_kernel(layer, layer.qweight.device) is not None for layer in layers)


def _plain_norm(norm: nn.Module) -> bool:
    """Whether it is of the last dimension, without weights."""
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
    if args or kwargs or isinstance(x, Deferred) or x.dim() != 3 or not _possible(x):
        result: Tensor = type(norm).forward(norm, x, *args, **kwargs)
        return result
    return Deferred(Normed(norm, x, x.dtype, x._version), x.shape, x.device)


def _possible(x: Tensor) -> bool:
    """Whether operations on x may be put off at all."""
    grads = torch.is_grad_enabled() and x.requires_grad
    return not (torch.compiler.is_compiling() or grads or x.is_inference() or torch.is_autocast_enabled(x.device.type))


def product(layer: PackedLinear, x: Tensor) -> Tensor | None:
    """The layer's output, not computed yet; None where it has to be computed the ordinary way, of the plain x."""
    kernel = _kernel(layer, x.device)
    if kernel is None or x.dim() != 3 or not _possible(x):
        return None
    norm, shape = _normed(x), torch.Size((*x.shape[:-1], layer.out_features))
    if norm is None:
        rounded = KERNELS[kernel].rounded(layer, plain(x))
    else:
        _check(norm)
        assert layer.rounding is not None
        if layer.rounding not in norm.read:
            norm.read[layer.rounding] = KERNELS[kernel].rounded(layer, norm)
        rounded = norm.read[layer.rounding]
    return Deferred(Product(layer, kernel, rounded, shape, x.dtype), shape, x.device)


def _kernel(layer: PackedLinear, device: torch.device) -> str | None:
    """The kernel of a layer, if it can put its work off."""
    name = layer.kernel(device.type)
    able = getattr(KERNELS[name], "puts_off", None)
    return name if able is not None and not layer.scheme.output_norm and able(layer, device) else None


def _check(work: Normed | Product) -> None:
    if isinstance(work, Normed) and work.x._version != work.version:
        raise RuntimeError("the input of a norm was changed before its output was read: use set_fusion(model, False)")


def plain(x: Any) -> Any:
    """x with its numbers."""
    return x.plain() if isinstance(x, Deferred) else x
