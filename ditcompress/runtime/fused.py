"""Elementwise passes on CPU, compiled to one loop once there is enough work to pay for it.

Rounding tokens and scaling sums are a dozen passes over memory in plain torch, a fifth of a block's time; compiled they
are one each. The compiler takes some seconds (less from its cache on disk), so by default the first `ENOUGH` elements
of a process run uncompiled: short runs and small models never wait. Values are the same to the bit either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal

import torch

ENOUGH = 2**31  # elements: about 20 s of a core's time
Fuse = Literal["auto", "always", "never"]
_when: Fuse = "auto"


def set_fused(when: Fuse) -> Fuse:
    """Whether rounding on CPU is compiled: from the first call ("always"), after some seconds of work ("auto", the
    default), or not at all ("never"); what held before. Without a C++ compiler nothing is. ValueError for another word.
    """
    global _when
    if when not in ("auto", "always", "never"):
        raise ValueError(f"fused {when!r}: take 'auto', 'always' or 'never'")
    before, _when = _when, when
    return before


@contextmanager
def fused(when: Fuse = "always") -> Iterator[None]:
    """`set_fused(when)` inside the block."""
    before = set_fused(when)
    try:
        yield
    finally:
        set_fused(before)


class Fused:
    """A function of tensors, the first of which tells the work; compiled for any shape when it is worth it, once for
    every kind of arguments. Each kind has a code object of its own, because the compiler looks through all that it has
    made of one at every call, which took 2 ms of a block's 75."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seen, self.broken = function, 0, False
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling() or _when == "never" or self.broken or torch.is_grad_enabled():
            return self.function(x, *rest)
        if x.dim() > 1 and x.numel() < 2 * x.shape[-1]:  # no work, and a compilation of its own
            return self.function(x, *rest)
        self.seen += x.numel()
        if _when == "auto" and self.seen < ENOUGH:
            return self.function(x, *rest)
        kind = tuple((a.dtype, a.dim()) if isinstance(a, torch.Tensor) else a for a in (x, *rest))
        try:
            if kind not in self.compiled:
                self.compiled[kind] = torch.compile(_twin(self.function), dynamic=True)
            return self.compiled[kind](x, *rest)
        except Exception as error:  # no compiler, or one that does not work: as fast as plain torch is
            result = self.function(x, *rest)  # raises where it is the inputs that are wrong
            self.broken = True
            logging.getLogger(__name__).info("rounding stays uncompiled: %s", error)
            return result


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with another code object; a callable that is no plain function as it is."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
