"""Taylor: how much the output changes to first order when a unit is silenced (after Molchanov et al. 2019, 1906.10771).

A unit with output x that goes changes a loss L by -<dL/dx, x> to first order. With L = <v, y / |y|> for a random
direction v the expected square of it is the squared relative change of the prediction y (the projection trick of
calibration/sensitivity.py). One forward and one backward pass a probe serve all units; a head that several linears
read counts once, with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ...models.base import Axis
from ..base import Probe, ProbeParams
from ._axes import Scope, count_of
from .base import Context, WidthParams, places

NEEDS = ("probes",)


class Params(ProbeParams, WidthParams):
    """`chunk`: images of a backward pass at once; `directions`: random directions a probe."""

    chunk: int = Field(16, ge=1)
    directions: int = Field(1, ge=1)
    scope: Scope = "global"


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """Mean over probes and images of the squared first-order change, (units,) float64."""
    total = {axis.name: torch.zeros(count_of(axis), dtype=torch.float64) for axis in axes}
    generator = torch.Generator().manual_seed(context.seed)
    with context.reporter.task("backward passes", len(context.probes)) as advance:
        for probe in context.probes:
            for start in range(0, len(probe.latents), params.chunk):
                part = probe.rows(slice(start, start + params.chunk))
                for _ in range(params.directions):
                    for name, found in changes(context, part, axes, generator).items():
                        total[name] += found.square().sum(0) / len(probe.latents)
            advance(1)
    return total


def changes(context: Context, probe: Probe, axes: Sequence[Axis], generator: torch.Generator) -> Mapping[str, Tensor]:
    """First-order change of <v, y / |y|> by the silencing of each unit, for each image: (images, units), float64."""
    found = {axis.name: torch.zeros(len(probe.latents), count_of(axis), dtype=torch.float64) for axis in axes}
    by_module: dict[str, list[tuple[Axis, int, int]]] = {}
    for axis in axes:
        for module, start, stop in places(context.layout, axis):
            by_module.setdefault(module, []).append((axis, start, stop))

    def watch(parts: list[tuple[Axis, int, int]]) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]

            def arrive(gradient: Tensor) -> None:
                product = (gradient.detach().double() * x.detach().double()).flatten(1, -2).sum(1).cpu()
                for axis, start, stop in parts:
                    found[axis.name] -= product[:, start:stop].unflatten(1, (-1, axis.unit_size)).sum(2)

            if x.requires_grad:
                x.register_hook(arrive)

        return hook

    handles = [
        context.model.get_submodule(name).register_forward_pre_hook(watch(parts)) for name, parts in by_module.items()
    ]
    try:
        context.project(probe, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found
