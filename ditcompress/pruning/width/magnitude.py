"""Magnitude: the L2 norm of everything that belongs to a unit. Needs no data.

The norm goes over a unit's rows in every writer and its columns in every reader of its axis (the group magnitude of
Fang et al. 2023, DepGraph, arXiv 2301.12900, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...models.base import Axis, Layout
from ...structure import readers, spans, writers
from .base import Context, WidthParams

NEEDS: tuple[str, ...] = ()


class Params(WidthParams):
    """`scope`: local by default; norms of different blocks say little about each other."""


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """The norm of every unit, (units,), float64."""
    return {axis.name: magnitudes(context.layout, axis, context.read) for axis in axes}


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
