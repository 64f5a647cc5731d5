"""Modules that stand in several places: `quantization_config.shared` names, for each copy, the module that it is.

The tensors of a copy are neither stored nor held in memory; `state_dict` of the model still lists them, under both
names. What is done to the weights (statistics, smoothing, rounding) is done once, for all places of use: `tied` is the
table of a model without its copies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from .checkpoint.source import COPIES
from .errors import DitcompressError, printable
from .models.base import Axis, Layout, Site
from .runtime.scheme import WHERE

T = TypeVar("T")


def apply_shared(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Put the module `owner` in the place of each `copy`; E320 where the two are not alike or not apart,
    or the owner does not come first: the model's own walks then meet a shared tensor under the name it is stored by."""
    if not shared:
        return
    modules = dict(model.named_modules())
    order = {path: place for place, path in enumerate(modules)}
    paths = [*shared, *shared.values()]
    for copy, owner in shared.items():
        within = any(other != path and f"{other}.".startswith(f"{path}.") for path in (copy, owner) for other in paths)
        if not copy or copy == owner or owner in shared or within:
            raise _refused(copy, f"and {printable(owner, 80)} are not two modules apart")
        if copy not in modules or owner not in modules or _shapes(modules[copy]) != _shapes(modules[owner]):
            raise _refused(copy, f"is no module like {printable(owner, 80)} of this model")
        if order[copy] < order[owner]:
            raise _refused(copy, f"comes before {printable(owner, 80)}, whose place it shares")
    setattr(model, COPIES, dict(shared))
    tie(model)


def tie(model: nn.Module) -> None:
    """Put every owner in the place of its copies again, after modules of a model with tied ones were exchanged."""
    for copy, owner in copies_of(model).items():
        model.set_submodule(copy, model.get_submodule(owner))


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
    return getattr(model, COPIES, {})


def everywhere(values: Mapping[str, T], shared: Mapping[str, str]) -> dict[str, T]:
    """`values` by the names of what is stored, and once more by those of the copies."""
    found = dict(values)
    for copy, owner in shared.items():
        found |= {copy + name[len(owner) :]: value for name, value in values.items() if name.startswith(f"{owner}.")}
    return found


def owner_of(name: str, shared: Mapping[str, str]) -> str:
    """The module or tensor that really stands at the path `name`."""
    for copy, owner in shared.items():
        if f"{name}.".startswith(f"{copy}."):
            return owner + name[len(copy) :]
    return name


def tied(layout: Layout, shared: Mapping[str, str]) -> Layout:
    """`layout` of all places of use as the table of what is stored: a shared linear is one site, under its owner's name
    and block, and the input that its hook sees is that of every place, so statistics add up.

    An axis stands for all the axes that its linears read or write in other places. Where these have other readers, the
    inputs are no longer one and every site gets an input of its own. A fold stays where its rows are themselves shared
    in the same way (the values of an attention, those of a gated feed-forward): rows that some places have for
    themselves (norms, modulation) cannot absorb a scale of all.
    """
    if not shared:
        return layout
    classes = _classes(layout, shared)
    axes, parted = {}, set()
    for group in classes:
        looks = {(_readers(layout, name, shared), _folds(layout.axes[name], shared)) for name in group}
        if len({readers for readers, _ in looks}) > 1:
            parted |= set(group)
        own = all(_folds(layout.axes[name], shared) == layout.axes[group[0]].fold for name in group)
        for name in group:
            axis = layout.axes[name]
            axes[name] = axis if len(group) == 1 or (own and len(looks) == 1) else replace(axis, fold=())
    sites = []
    for site in layout.sites:
        if owner_of(site.name, shared) == site.name:
            sites.append(replace(site, reads=tuple("" if name in parted else name for name in site.reads)))
    return replace(layout, sites=tuple(sites), axes=axes)


def _readers(layout: Layout, axis: str, shared: Mapping[str, str]) -> frozenset[str]:
    return frozenset(owner_of(site.name, shared) for site in layout.sites if axis in site.reads)


def _folds(axis: Axis, shared: Mapping[str, str]) -> tuple[object, ...]:
    return tuple(replace(fold, tensor=owner_of(fold.tensor, shared)) for fold in axis.fold)


def _classes(layout: Layout, shared: Mapping[str, str]) -> list[list[str]]:
    """Axes that are one in different places of use: read or written by the same columns or rows of a shared linear, or
    folded into the same rows. Each class is in the order of the layout."""
    sites = layout.by_name()
    root = {name: name for name in layout.axes}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    def join(a: str, b: str) -> None:
        if a and b:
            root[find(b)] = find(a)

    for site in layout.sites:
        owner: Site = sites[owner_of(site.name, shared)]
        for here, there in zip((*site.reads, *site.writes), (*owner.reads, *owner.writes), strict=True):
            join(there, here)
    rows: dict[object, str] = {}
    for axis in layout.axes.values():
        for fold in _folds(axis, shared):
            join(rows.setdefault(fold, axis.name), axis.name)
    groups: dict[str, list[str]] = {}
    for name in layout.axes:
        groups.setdefault(find(name), []).append(name)
    return list(groups.values())
