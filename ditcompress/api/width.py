"""The width half of `prune`: which units go, what that does to each tensor, and the configuration that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DitcompressError
from ..loading import DitcompressConfig, as_loaded
from ..measures import ratio_db
from ..models.base import Axis, Layout
from ..pruning import method
from ..pruning.width import UNITS, Context, Narrowing, count_of, cut_axes, emptied, narrowed_config, narrowing, registry
from ..sharing import apply_shared
from ..structure import narrow, narrow_index
from ..text_stream import apply_text

METHOD = "obs-diff"  # the default


def check_ratio(option: str, ratio: float | None) -> None:
    """E203 unless it is None or lies between 0 and 1."""
    if ratio is not None and not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 < ratio < 1):
        raise DitcompressError("E203", f"{option} {ratio}", "is not between 0 and 1", f"for example {option} 0.5")


@dataclass(frozen=True)
class Width:
    """The share of neurons and heads that goes (None for nothing), and the method that chooses them."""

    ratio: float | None
    units: str
    name: str
    module: ModuleType
    params: Any

    @staticmethod
    def of(
        ratio: float | None, width_ratio: float | None, units: str, name: str = METHOD,
        settings: Mapping[str, Any] | None = None,
    ) -> Width:  # fmt: skip
        """The checked options; E203 where neither depth nor width is asked for."""
        check_ratio("--width-ratio", width_ratio)
        if ratio is None and width_ratio is None:
            raise DitcompressError("E203", "--ratio", "is missing", "give --ratio, --width-ratio or both")
        if units not in UNITS:
            raise DitcompressError("E203", f"--width-units {units}", "is not known", f"use {', '.join(UNITS)}")
        module, params = method(name, settings or {}, registry, "--width-set")
        return Width(width_ratio, units, name.replace("_", "-"), module, params)

    @property
    def learns(self) -> bool:
        """Whether a killed run has something to go on from."""
        return self.ratio is not None and bool({"sampler", "journal"} & {*self.module.NEEDS})

    @property
    def streams(self) -> bool:
        """Whether it works on a model whose blocks are read while they run."""
        return self.ratio is None or not (self.replaces or "sampler" in self.module.NEEDS)

    @property
    def replaces(self) -> bool:
        """Whether it puts new modules in the place of others, and does not choose units."""
        return hasattr(self.module, "linear") or hasattr(self.module, "text")

    def check(self, layout: Layout) -> None:
        """E203 where a whole axis would go, by the table of the whole model."""
        if self.ratio is None or self.replaces:
            return
        axis = emptied(cut_axes(layout, self.units), self.ratio)
        if axis is not None:
            what = f"would leave no {axis.unit} of the {count_of(axis)} in {axis.name.rpartition('.')[0]}"
            remedy = "give a smaller ratio, or --width-units neurons" if axis.unit == "head" else "give a smaller ratio"
            raise DitcompressError("E203", f"--width-ratio {self.ratio:g}", what, remedy)

    def settings(self) -> dict[str, Any]:
        if self.ratio is None:
            return {}
        return {"width_ratio": self.ratio, "width_units": self.units, "width_method": self.name,
                "width_params": self.params.model_dump()}  # fmt: skip


def with_ratio(width: Width, ratio: float) -> Width:
    """The width that a depth method asks for, where it does; E203 beside one that was asked for already."""
    if ratio and width.ratio is not None:
        raise DitcompressError("E203", "--width-ratio", "is chosen by the method", "leave it out")
    return replace(width, ratio=ratio) if ratio else width


@dataclass(frozen=True)
class Cut:
    """The configuration after the cut, what is left of each tensor as (dimension, indices), new values of tensors in
    their old shapes, and the facts. `linear`: modules in the place of feed-forwards and text sides, by path."""

    config: dict[str, Any]
    facts: dict[str, Any]
    left: Mapping[str, Sequence[tuple[int, Tensor]]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    linear: Mapping[str, nn.Module] = field(default_factory=dict)

    def gone(self, name: str) -> str:
        """The module that takes the place of the tensor `name` and others, or ""."""
        return next((path for path in self.linear if name.startswith(f"{path}.")), "")

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        tensor = self.tensors[name].to("cpu", tensor.dtype) if name in self.tensors else tensor
        for dim, index in self.left.get(name, ()):
            tensor = tensor.index_select(dim, index)
        return tensor


NOTHING = {"width": None, "stock": True}


def _narrowing(context: Context, width: Width) -> tuple[Narrowing, dict[str, Any]]:
    """What goes, and the facts; E205 for a model without an axis that can be cut."""
    axes: list[Axis] = cut_axes(context.layout, width.units)
    if not axes:
        name = type(context.model).__name__
        raise DitcompressError("E205", name, "no axis of it can be narrowed", "remove blocks with --ratio instead")
    found = narrowing(context, width.module, axes, width.params)
    rows = {
        a.name: {"kept": len(found.kept[a.name]), "of": a.size // a.unit_size} for a in axes if a.name in found.kept
    }
    own = None if not found.damage else ratio_db(found.damage)
    facts = {**width.settings(), "output_sqnr_db": own, "axes": rows}
    facts |= {"linear": list(found.linear)} if found.linear else {}
    facts |= {"text": [list(group) for group in found.text]} if found.text else {}
    return found, {"width": facts, "stock": True, "output_sqnr_db": None}


def sharing_config(config: Mapping[str, Any], shared: Mapping[str, str]) -> dict[str, Any]:
    """`config` of a model in which each module `shared` is the one that it names."""
    return {**config, "quantization_config": DitcompressConfig({}, {}, recipe="prune", shared=shared).to_dict()}


def _linear_config(found: Narrowing) -> DitcompressConfig:
    """That of a model in which linears stand for feed-forwards or text sides."""
    text = [list(group) for group in found.text]
    return DitcompressConfig({}, {}, recipe="prune", linear=sorted(found.linear), text=text)


def tied_model(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Tie the modules of a model in memory, in place, so that its `save_pretrained` writes what loads again."""
    apply_shared(model, shared)
    as_loaded(model, DitcompressConfig({}, {}, recipe="prune", shared=shared))


def cut_of(config: dict[str, Any], width: Width, ready: Callable[[], Context]) -> Cut:
    """The cut of a model of `config`; `ready` gives what the method looks at."""
    if width.ratio is None:
        return Cut(config, NOTHING)
    context = ready()
    found, facts = _narrowing(context, width)
    if found.linear or found.text:
        config = {**config, "quantization_config": _linear_config(found).to_dict()}
        new: dict[str, nn.Module] = {**found.linear}
        for inside in found.text.values():
            new |= inside
        return Cut(config, facts | {"stock": False}, linear=new)
    if not found.kept:
        return Cut(config, facts, {}, found.tensors)
    left: dict[str, list[tuple[int, Tensor]]] = {}
    for site, dim, index in narrow_index(context.layout, found.kept):
        left.setdefault(f"{site.name}.weight", []).append((dim, index))
        if dim == 0:
            left.setdefault(f"{site.name}.bias", []).append((0, index))
    config = narrowed_config(config, context.layout, found.kept)
    return Cut(config, facts | {"stock": "quantization_config" not in config}, left, found.tensors)


def narrowed_model(model: nn.Module, width: Width, ready: Callable[[], Context]) -> dict[str, Any]:
    """Narrow a model in memory, in place, so that its `save_pretrained` writes what loads again; the facts."""
    if width.ratio is None:
        return NOTHING
    context = ready()
    found, facts = _narrowing(context, width)
    if found.linear or found.text:
        for path, linear in found.linear.items():
            model.set_submodule(path, linear)
        apply_text(model, list(found.text), found.text)
        as_loaded(model, _linear_config(found))
        return facts | {"stock": False}
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in found.tensors.items():
            state[name].copy_(tensor)
        narrow(model, context.layout, found.kept)
    before = {**dict(model.config), "_class_name": type(model).__name__}  # type: ignore[arg-type]
    after = narrowed_config(before, context.layout, found.kept) if found.kept else before
    fields = after.pop("quantization_config", None)
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    model.register_to_config(**changed)  # type: ignore[operator]
    if fields is not None:
        as_loaded(model, DitcompressConfig(**fields))
    return facts | {"stock": fields is None}
