"""random: neurons and router at random; the control that every other method must beat."""

from __future__ import annotations

import torch
from pydantic import Field

from ..formats.base import StrictParams
from .base import FeedForward, Split, parted, random_router

NEEDS: tuple[str, ...] = ()


class Params(StrictParams):
    """`std`: standard deviation of the router's weights (0.02 in DiT-MoE's upcycle.py)."""

    std: float = Field(0.02, gt=0)


def split(layer: FeedForward, params: Params) -> Split:
    """A uniformly random partition."""
    order = torch.randperm(layer.down.shape[1], generator=layer.generator).to(layer.down.device)
    shared, experts = parted(layer, order)
    return Split(shared, experts, *random_router(layer, params.std))
