"""The width half of `prune`: which units go, what that does to each tensor, and the configuration that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DitcompressError
from ..loading import DitcompressConfig, as_loaded
from ..models import adapter_for, build_meta
from ..models.base import Layout
from ..pruning import UNITS, cut_axes, kept_units, narrowed_config
from ..sharing import apply_shared
from ..structure import narrow, narrow_index


def check_ratio(option: str, ratio: float | None) -> None:
    """E203 unless it is None or lies between 0 and 1."""
    if ratio is not None and not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 < ratio < 1):
        raise DitcompressError("E203", f"{option} {ratio}", "is not between 0 and 1", f"for example {option} 0.5")


@dataclass(frozen=True)
class Width:
    """The share of neurons and heads that goes; None for nothing."""

    ratio: float | None
    units: str

    @staticmethod
    def of(ratio: float | None, width_ratio: float | None, units: str) -> Width:
        """The checked options; E203 where neither depth nor width is asked for."""
        check_ratio("--width-ratio", width_ratio)
        if ratio is None and width_ratio is None:
            raise DitcompressError("E203", "--ratio", "is missing", "give --ratio, --width-ratio or both")
        if units not in UNITS:
            raise DitcompressError("E203", f"--width-units {units}", "is not known", f"use {', '.join(UNITS)}")
        return Width(width_ratio, units)

    def settings(self) -> dict[str, Any]:
        return {} if self.ratio is None else {"width_ratio": self.ratio, "width_units": self.units}


@dataclass(frozen=True)
class Cut:
    """The configuration after the cut, what is left of each tensor as (dimension, indices), and the facts."""

    config: dict[str, Any]
    facts: dict[str, Any]
    left: Mapping[str, Sequence[tuple[int, Tensor]]] = field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        for dim, index in self.left.get(name, ()):
            tensor = tensor.index_select(dim, index)
        return tensor


def _kept(
    layout: Layout, width: Width, name: str, read: Callable[[str], Tensor]
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The units that stay, by axis, and the facts; E205 for a model without an axis that can be cut."""
    if width.ratio is None:
        return {}, {"width": None, "stock": True}
    axes = cut_axes(layout, width.units)
    if not axes:
        raise DitcompressError("E205", name, "no axis of it can be narrowed", "remove blocks with --ratio instead")
    kept = kept_units(layout, axes, width.ratio, read)
    rows = {a.name: {"kept": len(kept[a.name]), "of": a.size // a.unit_size} for a in axes if a.name in kept}
    return kept, {"width": {**width.settings(), "axes": rows}, "stock": True, "output_sqnr_db": None}


def sharing_config(config: Mapping[str, Any], shared: Mapping[str, str]) -> dict[str, Any]:
    """`config` of a model in which each module `shared` is the one that it names."""
    return {**config, "quantization_config": DitcompressConfig({}, {}, recipe="prune", shared=shared).to_dict()}


def tied_model(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Tie the modules of a model in memory, in place, so that its `save_pretrained` writes what loads again."""
    apply_shared(model, shared)
    as_loaded(model, DitcompressConfig({}, {}, recipe="prune", shared=shared))


def cut_of(config: dict[str, Any], width: Width, read: Callable[[str], Tensor]) -> Cut:
    """The cut of a checkpoint whose tensors `read` gives under the names of `config`'s model."""
    layout = adapter_for(config).layout(build_meta(config)) if width.ratio is not None else Layout((), {}, ())
    kept, facts = _kept(layout, width, str(config.get("_class_name")), read)
    if not kept:
        return Cut(config, facts)
    left: dict[str, list[tuple[int, Tensor]]] = {}
    for site, dim, index in narrow_index(layout, kept):
        left.setdefault(f"{site.name}.weight", []).append((dim, index))
        if dim == 0:
            left.setdefault(f"{site.name}.bias", []).append((0, index))
    config = narrowed_config(config, layout, kept)
    return Cut(config, facts | {"stock": "quantization_config" not in config}, left)


def narrowed_model(model: nn.Module, width: Width) -> dict[str, Any]:
    """Narrow a model in memory, in place, so that its `save_pretrained` writes what loads again; the facts."""
    name = type(model).__name__
    layout = adapter_for(name).layout(model)
    state = model.state_dict()
    kept, facts = _kept(layout, width, name, lambda key: state[key].detach().cpu())
    if not kept:
        return facts
    with torch.no_grad():
        narrow(model, layout, kept)
    before = {**dict(model.config), "_class_name": name}  # type: ignore[arg-type]
    after = narrowed_config(before, layout, kept)
    fields = after.pop("quantization_config", None)
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    model.register_to_config(**changed)  # type: ignore[operator]
    if fields is not None:
        as_loaded(model, DitcompressConfig(**{k: v for k, v in fields.items() if k != "quant_method"}))
    return facts | {"stock": fields is None}
