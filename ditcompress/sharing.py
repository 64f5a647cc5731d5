"""Modules that stand in several places: `quantization_config.shared` names, for each copy, the module that it is.

The tensors of a copy are neither stored nor held in memory; `state_dict` of the model still lists them, under both
names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from .errors import DitcompressError, printable
from .runtime.scheme import WHERE

ATTRIBUTE = "ditcompress_shared"  # of a model with tied modules


def apply_shared(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Put the module `owner` in the place of each `copy`; E320 where the two are not alike or not apart."""
    if not shared:
        return
    modules = dict(model.named_modules())
    paths = [*shared, *shared.values()]
    for copy, owner in shared.items():
        within = any(other != path and f"{other}.".startswith(f"{path}.") for path in (copy, owner) for other in paths)
        if not copy or copy == owner or owner in shared or within:
            raise _refused(copy, f"and {printable(owner, 80)} are not two modules apart")
        if copy not in modules or owner not in modules or _shapes(modules[copy]) != _shapes(modules[owner]):
            raise _refused(copy, f"is no module like {printable(owner, 80)} of this model")
    for copy, owner in shared.items():
        model.set_submodule(copy, modules[owner])
    setattr(model, ATTRIBUTE, dict(shared))


def _refused(copy: str, what: str) -> DitcompressError:
    return DitcompressError("E320", f"{WHERE}.shared", f"{printable(copy, 80)} {what}", "prune the original again")


def _shapes(module: nn.Module) -> tuple[object, ...]:
    return type(module), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def stored_once(names: Sequence[str], shared: Collection[str]) -> list[str]:
    """`names` of tensors without those of the copies `shared`."""
    inside = tuple(f"{copy}." for copy in shared)
    return [name for name in names if not (inside and name.startswith(inside))]


def copies_of(model: nn.Module) -> Mapping[str, str]:
    """The modules of `model` that are tied to others."""
    return getattr(model, ATTRIBUTE, {})
