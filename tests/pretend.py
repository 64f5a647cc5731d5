"""A pretend accelerator: tensors that say they are elsewhere, hold their values on the CPU, and refuse CPU ones.

What runs here as well as on the CPU runs on a GPU as far as devices go, and its results are equal to the bit. Torch's
device type "lazy" stands for the accelerator: it is the one that a CPU build lets tensors be moved to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # take indices from the CPU as well


class There(Tensor):
    """A tensor on the accelerator; `raw` holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        """Torch refuses it for subclasses."""
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """A context in which tensors can be moved to `DEVICE` and made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(t.raw): t for t in tensors if isinstance(t, There)}
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if not there and asked != DEVICE.type:
        return func(*args, **kwargs)
    if there and func not in MOVES:
        _check(func, args, [t for t in tensors if not isinstance(t, There) and t.dim()])
    found = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if asked not in (None, DEVICE.type):
        return found

    def wrapped(value: Any) -> Any:
        own = there.get(id(value))  # an operation in place gives its argument back
        return There(value) if own is None and isinstance(value, Tensor) else value if own is None else own

    return tree_map(wrapped, found)


def _check(func: Any, args: Any, strangers: list[Tensor]) -> None:
    allowed = func.overloadpacket in INDEXING and isinstance(args[0], There)
    if strangers and not (allowed and not any(t.is_floating_point() for t in strangers)):
        raise RuntimeError(f"{func}: tensors on the accelerator and on the CPU")


def _raw(value: Any) -> Any:
    if isinstance(value, There):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) else value
