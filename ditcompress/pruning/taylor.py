"""Taylor: how much the output changes to first order when a block is removed (after Molchanov et al. 2017, 1611.06440).

Removing block b takes its update d = output - input off the stream, so a loss L changes by <dL/d(output), d> to first
order. With L = <v, y / |y|> for a random direction v, the expectation of the squared change over v is the squared
relative change of the prediction y (the projection trick of calibration/sensitivity.py). One forward and one backward
pass a probe serve all blocks; parameters take no gradient, so memory is that of the activations.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ._streams import Streams, watched
from .base import Context, Probe, ProbeParams, Scores

NEEDS = ("probes",)


class Params(ProbeParams):
    """`chunk`: images of a backward pass at once; `directions`: random directions a probe."""

    chunk: int = Field(8, ge=1)
    directions: int = Field(1, ge=1)


def scores(context: Context, params: Params) -> Scores:
    """Mean over images and directions of the squared first-order change of each unit, kept for every timestep."""
    blocks = context.depth.of(context.names)
    table: dict[str, list[float]] = {block: [] for block in blocks}
    generator = torch.Generator().manual_seed(context.seed)
    with context.reporter.task("backward passes", len(context.probes)) as advance:
        for probe in context.probes:
            sums = dict.fromkeys(blocks, 0.0)
            for start in range(0, len(probe.latents), params.chunk):
                part = probe.rows(slice(start, start + params.chunk))
                for _ in range(params.directions):
                    for block, value in changes(context, part, blocks, generator).items():
                        sums[block] += value
            for block in blocks:
                table[block].append(sums[block] / (len(probe.latents) * params.directions))
            advance(1)
    return context.average(table)


def changes(context: Context, probe: Probe, blocks: tuple[str, ...], generator: torch.Generator) -> dict[str, float]:
    """Squared first-order change of <v, y / |y|>, summed over the images of `probe`, for each block."""
    found: dict[str, Tensor] = {}

    def see(block: str, pairs: Streams) -> None:
        for x, y in pairs:
            update = (y - x).detach().float()

            def arrive(gradient: Tensor, block: str = block, update: Tensor = update) -> None:
                change = (gradient.float() * update).flatten(1).sum(1).double().cpu()
                found[block] = found.get(block, torch.zeros_like(change)) + change

            if y.requires_grad:
                y.register_hook(arrive)

    with watched(context.model, blocks, see):
        context.project(probe, generator).backward()
    return {block: float(found[block].square().sum()) if block in found else 0.0 for block in blocks}
