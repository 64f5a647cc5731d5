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
    """The last result of a function of one tensor, for as long as that tensor lives unchanged."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Tensor], int, Hashable, Sequence[Tensor | None], Any] | None = None

    def __call__(self, x: Tensor, key: Hashable, others: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
        """`make()`, or what it was for the same tensor object, an equal `key` and equal `others`."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference() or not x.is_cpu:
            return make()  # a GPU would have to wait for the comparison, and a graph replays without telling
        known = self._known
        if known is not None and known[0]() is x and known[1:3] == (x._version, key) and _equal(known[3], others):
            return known[4]
        self._known = None  # before more memory is asked for
        result = make()
        self._known = (weakref.ref(x, self._forget), x._version, key, others, result)
        return result

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._known is not None and self._known[0] is gone:
            self._known = None


def rounded_once(
    latest: Latest, layer: Layer, x: Tensor, rounds: Callable[[Layer, Tensor], Any], dtype: torch.dtype | None = None
) -> tuple[Tensor, Any]:
    """The transformed input and what `rounds` makes of it, shared by layers that transform and round it alike."""
    scheme, stored = layer.scheme, layer.stored_tensors()
    online = scheme.smooth == "online"
    if scheme.activation.mode == "none" and not online and not scheme.rotate:
        return x, rounds(layer, x)

    def make() -> tuple[Tensor | None, Any]:
        met = layer.transformed(x)
        return (None if met is x else met), rounds(layer, met)  # x itself must not live on in what is kept of it

    key = (scheme.activation, online, scheme.rotate, dtype)
    met, rounded = latest(x, key, [stored.get(name) for name in DECIDING], make)
    return (x if met is None else met), rounded


def _equal(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )
