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
from .ops._normed import Normed, Seen, check, kind_of
from .ops._shared import DECIDING

if TYPE_CHECKING:
    from .linear import PackedLinear


PUTS_OFF = "ditcompress_puts_off"  # attribute of a norm


@dataclass(frozen=True)
class Product:
    """gate * activation(layer(x)) (B, T, N) of an input that is rounded already; gate (B or 1, 1, N). `seen`: tensors
    that it will read, and their versions."""

    layer: PackedLinear
    kernel: str
    rounded: Any
    shape: torch.Size
    dtype: torch.dtype
    activation: str | None = None
    gate: Tensor | None = None
    seen: Seen = ()

    def compute(self, residual: Tensor | None = None) -> Tensor:
        made = self.layer._prepared(self.kernel, self.dtype)
        gate = None if residual is None else self.gate  # alone it is no kernel's
        y: Tensor = KERNELS[self.kernel].computed(
            self.layer, made, self.rounded, self.shape, self.dtype, self.activation, residual, gate
        )
        return y if self.gate is None or residual is not None else y * self.gate


class Deferred(Tensor):
    """A tensor that is computed when its numbers are asked for."""

    work: Normed | Product | None  # nothing once it is done
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
            assert self.work is not None
            check(self.work.seen)
            self.value, self.work = self.work.compute(), None
        return self.value

    def noted(self, vector: Tensor | None = None, **what: Any) -> Deferred:
        """The same with one more operation, by a `vector` or none."""
        assert self.work is not None
        if vector is not None:
            what["seen"] = (*self.work.seen, (vector, vector._version))
        if what and isinstance(self.work, Normed):
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
    """Whether v is one row for each sample of x, of a dtype that leaves the result's, and takes no gradient."""
    return (
        _still(v) and not isinstance(v, Deferred) and v.dtype == x.dtype and v.dim() == x.dim() == 3
        and v.shape[0] in (1, x.shape[0]) and v.shape[1:] == (1, x.shape[2])
    )  # fmt: skip


def _still(v: Any) -> bool:
    """Whether v is a tensor whose use may be put off."""
    return isinstance(v, Tensor) and not v.is_inference() and not (v.requires_grad and torch.is_grad_enabled())


def _two(rule: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A rule for two plain arguments; any other call is not noted."""
    return lambda *args, **kwargs: NotImplemented if kwargs or len(args) != 2 else rule(*args)


def _times(a: Any, b: Any) -> Any:
    x, v = (a, b) if isinstance(a, Deferred) else (b, a)
    norm, last = _normed(x), _product(x)
    if (norm or last) and isinstance(v, (int, float)) and v == 1:
        return x.noted()
    if not _vector(v, x):
        return NotImplemented
    if norm and norm.scale is None and norm.shift is None:
        return x.noted(v, scale=v)
    return x.noted(v, gate=v) if last and last.gate is None else NotImplemented


def _plus(a: Any, b: Any) -> Any:
    x, v = (a, b) if isinstance(a, Deferred) else (b, a)
    norm, last = _normed(x), _product(x)
    if norm and norm.shift is None and _vector(v, x):
        return x.noted(v, shift=v)
    v = plain(v)
    if not last or not _still(v) or (v.shape, v.dtype) != (x.shape, x.dtype):
        return NotImplemented
    check(last.seen)
    return last.compute(v)


def _divided(x: Any, by: Any) -> Any:
    pending = _normed(x) or _product(x)
    return x.noted() if pending and isinstance(by, (int, float)) and by == 1 else NotImplemented


def _activated(x: Any, name: str) -> Any:
    last = _product(x)
    return x.noted(activation=name) if last and last.activation is None and last.gate is None else NotImplemented


def _silu(*args: Any, inplace: bool = False, **kwargs: Any) -> Any:
    return NotImplemented if inplace or kwargs or len(args) != 1 else _activated(args[0], "silu")


def _gelu(*args: Any, approximate: str = "none", **kwargs: Any) -> Any:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return NotImplemented if kwargs or len(args) != 1 or name is None else _activated(args[0], name)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else x


def _to(x: Any, dtype: Any) -> Any:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    if dtype == x.dtype:
        return x
    return x.noted(dtype=dtype) if _normed(x) else NotImplemented


def _type_as(x: Any, other: Any) -> Any:
    return _to(x, other.dtype) if isinstance(x, Deferred) and other.device == x.device else NotImplemented


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.mul: _two(_times), torch.mul: _two(_times), Tensor.add: _two(_plus), torch.add: _two(_plus),
    Tensor.div: _two(_divided), Tensor.to: _two(_to), Tensor.type_as: _two(_type_as),
    torch.nn.functional.gelu: _gelu, torch.nn.functional.silu: _silu, torch.nn.functional.dropout: _dropout,
}  # fmt: skip
_ABOUT = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")}
_ABOUT |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_inference}


# --- who puts off -----------------------------------------------------------------------------------------------------


def set_fusion(model: nn.Module, on: bool = True) -> nn.Module:
    """Whether norms and integer products of a loaded model are put off, to be computed together with what surrounds
    them; the model itself. Call it again after loading other weights."""
    for layer in packed(model):
        layer.rounding = _digest(layer) if on else None
    for module in model.modules():
        if not kind_of(module) or [*module.parameters()]:
            continue
        vars(module)[PUTS_OFF] = on  # for a forward of ours that somebody's hook has taken over
        now = vars(module).get("forward")
        if now is None and on:
            module.forward = functools.partial(_norm, module)  # type: ignore[method-assign]
        elif isinstance(now, functools.partial) and now.func is _norm and not on:
            del module.forward
    return model


def packed(model: nn.Module) -> list[PackedLinear]:
    from .linear import PackedLinear

    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def fusible(model: nn.Module) -> bool:
    """Whether `set_fusion` changes how a model runs where it lies."""
    return any(_kernel(layer, layer.qweight.device) is not None for layer in packed(model))


def _digest(layer: PackedLinear) -> str | None:
    """Equal for linears that transform and round an input alike; None for one that has no data here, or no kernel that
    puts work off."""
    stored, digest = layer.stored_tensors(), hashlib.sha256()
    if any(t.is_meta for t in stored.values()) or not any(map(_able, layer.kernels.values())):
        return None
    digest.update(repr((layer.scheme.activation, layer.scheme.smooth, layer.scheme.rotate)).encode())
    for name in DECIDING:
        if name in stored:
            digest.update(name.encode() + stored[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _norm(norm: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    width: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", ())
    ordinary = (
        args or kwargs or not vars(norm)[PUTS_OFF] or isinstance(x, Deferred) or tuple(width) != tuple(x.shape[-1:])
    )
    if ordinary or x.dim() != 3 or not _possible(x):
        result: Tensor = type(norm).forward(norm, x, *args, **kwargs)
        return result
    return Deferred(Normed(norm, x, x.dtype, ((x, x._version),)), x.shape, x.device)


def _possible(x: Tensor) -> bool:
    """Whether operations on x may be put off at all."""
    if torch.compiler.is_compiling() or not _still(x) or x.device.type not in ("cpu", "cuda"):
        return False
    return not torch.is_autocast_enabled(x.device.type)


def product(layer: PackedLinear, x: Tensor) -> Tensor | None:
    """The layer's output, not computed yet; None where it has to be computed the ordinary way, of the plain x."""
    if x.dim() != 3 or not _possible(x):
        return None
    kernel, bias = _kernel(layer, x.device), layer.bias
    if kernel is None or (bias is not None and not _still(bias)):
        return None
    norm, shape = _normed(x), torch.Size((*x.shape[:-1], layer.out_features))
    if norm is None:
        rounded = KERNELS[kernel].rounded(layer, plain(x))
    else:
        assert layer.rounding is not None
        if layer.rounding not in norm.read:
            check(norm.seen)
            norm.read[layer.rounding] = KERNELS[kernel].rounded(layer, norm)
        rounded = norm.read[layer.rounding]
    return Deferred(Product(layer, kernel, rounded, shape, x.dtype), shape, x.device)


def _kernel(layer: PackedLinear, device: torch.device) -> str | None:
    """The kernel of a layer, if it can put its work off: not one whose tensors come and go with its call."""
    name, hooked = layer.kernel(device.type), "forward" in vars(layer)
    fits = not hooked and not layer.scheme.output_norm and _able(name)
    return name if fits and KERNELS[name].puts_off(layer, device) else None


def _able(kernel: str) -> bool:
    return hasattr(KERNELS[kernel], "puts_off")


def plain(x: Any) -> Any:
    """x with its numbers."""
    return x.plain() if isinstance(x, Deferred) else x
