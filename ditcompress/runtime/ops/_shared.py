"""Rounding an input once for all linears that read it: q, k and v come one after the other with the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Layer

DECIDING = ("smooth", "rotate_sign", "input_scale", "input_zero")  # stored tensors that decide what an input becomes


class Latest:
    """The last result of a function of one tensor, for as long as that tensor lives unchanged. A write that torch does
    not see (through `.data` or numpy) between two calls in a row with one tensor object is not noticed."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Tensor], Hashable, Sequence[Tensor | None], Any] | None = None

    def __call__(self, x: Tensor, key: Hashable, others: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
        """`make()`, or what it was for the same tensor object, an equal `key` and equal `others` (small ones)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference() or not x.is_cpu:
            return make()  # a GPU would have to wait for the comparison, and a graph replays without telling
        key = (key, x.data_ptr(), x._version, x.shape, x.stride(), torch.is_autocast_enabled("cpu"))
        known = self._known
        if known is not None and known[0]() is x and known[1] == key and _equal(known[2], others):
            return known[3]
        self._known = None  # before more memory is asked for
        result = make()
        copies = [None if tensor is None else tensor.clone() for tensor in others]  # they may change in place
        self._known = (weakref.ref(x, self._forget), key, copies, result)
        return result

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        known = self._known
        if known is not None and known[0] is gone:
            self._known = None


_latest = Latest()  # one for all kernels: what runs in between takes its place


def rounded_once(
    layer: Layer, x: Tensor, rounds: Callable[[Layer, Tensor, torch.dtype], Any], dtype: torch.dtype
) -> tuple[Tensor | None, Any]:
    """What `rounds` makes of the transformed input, shared by layers that transform and round it alike; before it the
    transformed input, where a low-rank part needs it."""
    scheme, stored = layer.scheme, layer.stored_tensors()
    online, ranked = scheme.smooth == "online", bool(scheme.rank)
    plain = not online and not scheme.rotate
    if plain and scheme.activation.mode == "none":
        return x, rounds(layer, x, dtype)

    def make() -> tuple[Tensor | None, Any]:
        met = layer.transformed(x)
        return (met if ranked and not plain else None), rounds(layer, met, dtype)  # what is kept must not hold x

    key = (rounds, scheme.activation, online, scheme.rotate, ranked, dtype)
    met, rounded = _latest(x, key, [stored.get(name) for name in DECIDING], make)
    return (x if plain else met), rounded


def _equal(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )
