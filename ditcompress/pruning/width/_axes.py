"""Which feed-forward neurons and attention heads can go, which stay by their scores, and the narrower configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import DitcompressError
from ...models import build_meta, with_defaults
from ...models.base import Axis, Layout
from ...structure import narrow, readers, writers

Scope = Literal["local", "global"]
UNITS = ("both", "neurons", "heads")
# Configuration keys that set the width of every feed-forward: as a number, or as a multiple of the model's width.
FEED_FORWARD_KEYS = (
    "ffn_dim", "ff_dim", "ffn_hidden_size", "intermediate_size", "ff_inner_dim", "mlp_ratio", "ff_mult",
)  # fmt: skip


def cut_axes(layout: Layout, units: str) -> list[Axis]:
    """The axes that are narrowed: neurons of feed-forwards, heads of attentions, inside the blocks."""
    found = []
    for axis in layout.axes.values():
        outputs = readers(layout, axis.name)
        inside = axis.cut and bool(outputs) and all(site.block for site in outputs)
        neurons = axis.unit == "neuron" and any(site.role == "ffn_out" for site in outputs)
        heads = axis.unit == "head"
        if inside and ((neurons and units != "heads") or (heads and units != "neurons")):
            found.append(axis)
    return found


def count_of(axis: Axis) -> int:
    """Units of an axis."""
    return axis.size // axis.unit_size


def emptied(axes: Sequence[Axis], ratio: float) -> Axis | None:
    """The first axis of which nothing would be left without the share `ratio` of its units: no attention runs without
    a head, and no configuration says that a block has none."""
    return next((axis for axis in axes if round(ratio * count_of(axis)) >= count_of(axis)), None)


def cost_of(layout: Layout, axis: Axis) -> int:
    """Parameters of one unit: its rows and biases in the writers, its columns in the readers."""
    rows = sum(site.writes.count(axis.name) * (site.in_features + 1) for site in writers(layout, axis.name))
    columns = sum(site.reads.count(axis.name) * site.out_features for site in readers(layout, axis.name))
    return (rows + columns) * axis.unit_size


def kept_units(
    layout: Layout, axes: Sequence[Axis], scores: Mapping[str, Tensor], ratio: float, scope: Scope = "local"
) -> dict[str, list[int]]:
    """The units (name of the axis -> indices) with the highest `scores` (units,), in their old order; at least one an
    axis. Ties keep the first. Axes that lose nothing are left out.

    Scope "local": every axis loses the share `ratio`. "global": axes whose units are alike (heads or neurons of one
    size) lose together as many units as they would lose one by one, so that the parameters are the same.
    """
    left = {axis.name: max(1, count_of(axis) - round(ratio * count_of(axis))) for axis in axes}
    if scope == "global":
        groups: dict[tuple[str, int], list[Axis]] = {}
        for axis in axes:
            groups.setdefault((axis.unit, cost_of(layout, axis)), []).append(axis)
        for group in groups.values():
            left |= _shared_out(group, scores, sum(left[axis.name] for axis in group))
    kept = {}
    for axis in axes:
        if left[axis.name] < count_of(axis):
            order = torch.argsort(scores[axis.name], descending=True, stable=True)
            kept[axis.name] = sorted(order[: left[axis.name]].tolist())
    return kept


def _shared_out(group: Sequence[Axis], scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of `total` units each axis keeps: its best, then the best of all."""
    rest = [torch.sort(scores[axis.name].double(), descending=True, stable=True).values[1:] for axis in group]
    owner = torch.cat([torch.full((len(values),), place) for place, values in enumerate(rest)])
    best = owner[torch.argsort(torch.cat(rest), descending=True, stable=True)][: total - len(group)]
    return {axis.name: 1 + int((best == place).sum()) for place, axis in enumerate(group)}


def narrowed_config(config: Mapping[str, Any], layout: Layout, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """`config` for the narrower model: one number changed where stock diffusers can say it, else `shapes` in a
    quantization_config that ditcompress applies at loading. E205 where neither describes the model."""
    wanted = build_meta(config)
    narrow(wanted, layout, kept)
    full = with_defaults(config)
    counts = {name: layout.axes[name].size // layout.axes[name].unit_size for name in kept}
    shares = {len(units) / counts[name] for name, units in kept.items()}
    for key in FEED_FORWARD_KEYS if len(shares) == 1 else ():
        value = full.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            scaled = value * next(iter(shares))
            trial = {**config, key: round(scaled) if isinstance(value, int) else scaled}
            if _alike(trial, wanted):
                return trial
    fields = {"quant_method": "ditcompress", "version": 1, "recipe": "prune", "schemes": {}, "layers": {}}
    return {**config, "quantization_config": {**fields, "shapes": {name: len(units) for name, units in kept.items()}}}


def _alike(config: Mapping[str, Any], wanted: nn.Module) -> bool:
    try:
        found = build_meta(config).state_dict()
    except DitcompressError:
        return False
    return {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.state_dict().items()}
