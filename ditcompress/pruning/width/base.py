"""What a width-pruning method is: one file that says how much each attention head and feed-forward neuron matters.

A method module exports `Params`, `NEEDS` (some of "probes": it runs the model at recorded inputs; "sampler": it runs
the whole sampler and learns; "journal": it goes on where it was killed) and

    scores(context, axes, params) -> {axis: Tensor(units,)}         importance of each unit, higher = keep
    linear(context, axes, params) -> {path: nn.Linear}              optional, instead of the choice by scores: linears
                                                                    that take the place of whole feed-forwards
    text(context, params) -> {(anchor, last block): {path: module}} optional, instead of the choice by scores: what
                                                                    stands for the text sides of groups of blocks
    rewrite(context, axes, kept, params) -> {tensor: new value}     optional: new values of tensors, by the names and in
                                                                    the shapes that they have before the cut

`Params` derives from `WidthParams`: `scope` says whether every axis loses the same share, or alike axes share their
loss. The model is never changed for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.conditions import Conditions
from ...formats.base import StrictParams
from ...linear_ffn import standing_in
from ...models.base import Axis, Layout
from ...offload import tensor_of
from ...registry import Registry
from ...structure import narrow_index, readers, spans
from ...text_stream import Group, text_replaced
from .. import base as depth
from ._axes import Scope, count_of, kept_units

registry = Registry("ditcompress.pruning.width", "width method", ("Params", "NEEDS", "scores"))


class WidthParams(StrictParams):
    """`scope` local: every axis loses the same share; global: alike axes (heads or neurons of one size) lose together
    as many units as they would lose one by one."""

    scope: Scope = "local"


@dataclass
class Context(depth.Context):
    """Everything a width method may look at: what depth methods see, and what drives the sampler. `ratio` is the share
    of units that will go; `conditions(n)` are those of n images;
    `cache` holds what a method needs twice."""

    ratio: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    guidance: float = 1.0
    conditions: Callable[[int], Conditions] | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """A tensor of the model by name, on the CPU."""
        return tensor_of(self.model, name)


@dataclass(frozen=True)
class Narrowing:
    """The units that stay, by axis; new values of tensors in their old shapes; and the share of the prediction's energy
    that is wrong afterwards (None where the model was not run)."""

    kept: Mapping[str, Sequence[int]]
    tensors: Mapping[str, Tensor]
    damage: float | None
    linear: Mapping[str, nn.Linear] = field(default_factory=dict)
    text: Mapping[Group, Mapping[str, nn.Module]] = field(default_factory=dict)


def places(layout: Layout, axis: Axis) -> list[tuple[str, int, int]]:
    """(module, first column, last column + 1) of every place where a reader takes the channels of `axis`."""
    return [
        (site.name, start, stop)
        for site in readers(layout, axis.name)
        for start, stop in spans(layout, site.reads, site.in_features, axis.name)
    ]


def silenced(context: Context, kept: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` and every reader's weight with zeros where its units go: the narrow model in the old shapes."""
    found = dict(tensors)
    for site, dim, index in narrow_index(context.layout, kept):
        if dim == 1:
            name = f"{site.name}.weight"
            weight = found.get(name, context.read(name))
            found[name] = torch.zeros_like(weight).index_copy_(1, index, weight.index_select(1, index))
    return found


def narrowing(context: Context, module: ModuleType, axes: Sequence[Axis], params: Any) -> Narrowing:
    """Run a method: its scores decide what stays, its `rewrite` what the rest looks like."""
    if hasattr(module, "linear"):
        linear = module.linear(context, axes, params)
        context.references()
        with standing_in(context.model, linear):
            return Narrowing({}, {}, context.damage(()), linear)
    if hasattr(module, "text"):
        text = module.text(context, params)
        context.references()
        with text_replaced(context.model, text):
            return Narrowing({}, {}, context.damage(()), text=text)
    found = module.scores(context, axes, params)
    for axis in axes:
        if found[axis.name].shape != (count_of(axis),):
            raise TypeError(f"{module.__name__} must score every unit of {axis.name}")
    kept = kept_units(context.layout, axes, found, context.ratio, params.scope)
    tensors = dict(module.rewrite(context, axes, kept, params)) if hasattr(module, "rewrite") else {}
    damage = context.damage((), silenced(context, kept, tensors)) if context.probes else None
    return Narrowing(kept, tensors, damage)
