"""Width: which feed-forward neurons and attention heads go, by the magnitude of everything that belongs to them.

The score of a unit is the L2 norm over its rows in every writer and its columns in every reader of its axis (the group
magnitude of Fang et al. 2023, DepGraph, arXiv 2301.12900, section 3.4). Every axis loses the same share, so the blocks
stay alike and a configuration that has one number for all feed-forwards can still say it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DitcompressError
from ..models import build_meta, with_defaults
from ..models.base import Axis, Layout
from ..structure import narrow, readers, spans, writers

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


def magnitudes(layout: Layout, axis: Axis, read: Callable[[str], Tensor]) -> Tensor:
    """L2 norm of every unit, (units,), float64."""
    total = torch.zeros(axis.size // axis.unit_size, dtype=torch.float64)
    for sites, dim in ((writers(layout, axis.name), 0), (readers(layout, axis.name), 1)):
        for site in sites:
            weight = read(f"{site.name}.weight").double()
            names = site.writes if dim == 0 else site.reads
            for start, stop in spans(layout, names, weight.shape[dim], axis.name):
                part = weight.narrow(dim, start, stop - start).square().sum(1 - dim)
                total += part.reshape(-1, axis.unit_size).sum(1)
    return total.sqrt()


def kept_units(
    layout: Layout, axes: Sequence[Axis], ratio: float, read: Callable[[str], Tensor]
) -> dict[str, list[int]]:
    """The strongest units of each axis in their old order; at least one. Ties keep the first."""
    kept = {}
    for axis in axes:
        count = axis.size // axis.unit_size
        left = max(1, count - round(ratio * count))
        if left < count:
            order = torch.argsort(magnitudes(layout, axis, read), descending=True, stable=True)
            kept[axis.name] = sorted(order[:left].tolist())
    return kept


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
