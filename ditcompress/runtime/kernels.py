"""Which kernel runs a packed linear: the first of an order that supports its scheme on its device.

The choice depends on nothing else, so it can be printed before anything runs (`inspect --kernels`). Weights are decoded
at each call, which keeps memory at the packed size, or once (`decode="load"`), which costs memory and saves that time.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from .ops.base import registry
from .scheme import Scheme

ORDER = (
    "cpu_int8",
    "triton_int8",
    "triton_fp8",
    "triton_float",
    "reference",
)  # the fastest first; the last runs everything
KERNELS = {name: registry.get(name) for name in ORDER}
DEVICES = ("cpu", "cuda")

Decode = Literal["call", "load"]


def choose(scheme: Scheme, device: str) -> str:
    """The name of the kernel that runs this scheme on this kind of device ("cpu", "cuda")."""
    return next(name for name in ORDER if KERNELS[name].supports(scheme, device))


def set_decode(model: nn.Module, when: Decode) -> nn.Module:
    """Decode the packed weights of a loaded model at each `call`, or once and keep them (`load`); the model itself.

    "load" takes up to a byte a weight more where integers run, and the bytes of the running dtype elsewhere; what is
    saved and `state_dict` stay as they are. ValueError for another word.
    """
    if when not in ("call", "load"):
        raise ValueError(f"decode {when!r}: take 'call' or 'load'")
    for module in model.modules():
        if hasattr(module, "decode_when"):
            module.decode_when = when  # type: ignore[assignment]
    return model
