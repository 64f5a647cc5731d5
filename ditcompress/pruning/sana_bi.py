"""SANA-1.5 (Xie et al. 2025, arXiv 2501.18427, section on depth pruning): block influence along the whole sampler.

The influence is ShortGPT's, measured at every one of 20 steps of the dense model's own sampler with its guidance; the
blocks of head and tail are kept, whatever their score: they read the latent and write the output.
"""

from __future__ import annotations

from pydantic import Field

from ._streams import measured
from .base import Context, ProbeParams, Scores
from .shortgpt import influence

NEEDS = ("probes",)


class Params(ProbeParams):
    """`head`, `tail`: units kept at both ends."""

    samples: int = Field(32, ge=1, le=100_000)
    steps: int = Field(20, ge=1, le=1000)
    head: int = Field(1, ge=0)
    tail: int = Field(1, ge=0)


def scores(context: Context, params: Params) -> Scores:
    """Mean influence of each unit; the blocks at both ends of the model are kept."""
    found = context.average(measured(context, influence))
    blocks = context.layout.blocks
    ends = {*blocks[: params.head], *blocks[len(blocks) - params.tail :]}
    keep = {name for name in context.names if ends & set(context.blocks(name))}
    return Scores(found.values, found.by_timestep, found.timesteps, frozenset(keep))
