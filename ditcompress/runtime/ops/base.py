"""What a kernel is: one way to run the product of a packed linear.

A module of this folder exports

    SAYS                                     one line for `inspect --kernels`
    supports(scheme, device) -> bool         whether it runs a scheme on a kind of device ("cpu", "cuda"): cheap
    prepare(layer, dtype, keep) -> Made      tensors that `run` needs beside the stored ones, made once and kept with
                                             the layer; with `keep` the decoded weight too, else only what is small
    run(layer, x, made, dtype) -> Tensor     x (..., in) as the linear gets it to (..., out) in `dtype`: smoothing and
                                             rotation, rounding, product, low-rank part, bias

How a weight is stored (`formats/`) is no kernel's business: the layer gives it as floats (`decoded`) or as INT8 with a
scale a row (`as_int8`, where the format has that form).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...registry import Registry
from ..scheme import Scheme

Made = dict[str, Tensor]
registry = Registry("ditcompress.runtime.ops", "kernel", ("SAYS", "supports", "prepare", "run"))


class Layer(Protocol):
    """What a kernel sees of a packed linear."""

    in_features: int
    out_features: int
    scheme: Scheme
    is_int8: bool

    @property
    def bias(self) -> Tensor | None: ...

    def stored_tensors(self) -> dict[str, Tensor]: ...

    def signs(self) -> Tensor: ...

    def transformed(self, x: Tensor) -> Tensor: ...

    def decoded(self) -> Tensor: ...

    def as_int8(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]: ...


def finished(layer: Layer, y: Tensor, x: Tensor | None, rounded: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product y with the low-rank part, of the transformed input x or of its `rounded` values, and the bias."""
    if layer.scheme.rank:
        assert x is not None
        stored = layer.stored_tensors()
        met = x.to(y.dtype) if layer.scheme.low_rank_input == "float" or rounded is None else rounded.to(y.dtype)
        down = torch.nn.functional.linear(met, stored["low_rank_down"].to(y.dtype))
        y = y + torch.nn.functional.linear(down, stored["low_rank_up"].to(y.dtype))
    return (y if layer.bias is None else y + layer.bias.to(y.dtype)).to(dtype)
