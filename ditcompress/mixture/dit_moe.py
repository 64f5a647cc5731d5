"""dit-moe: an upcycled model as DiT-MoE has it (arXiv 2407.11633; feizc/DiT-MoE `models.py`, `upcycle.py`).

Shared neurons always run; a token's routed experts count by their softmax scores; every layer's balance loss is added
in training (`training.balance`, 0.01 in the paper, summed over layers).

`upcycle` "copies" is the paper's: every routed expert holds all neurons that are not shared, so the model grows, and
with gates "norm" it is the dense one for any routing. DiT-MoE itself does not normalise ("softmax"), which starts the
routed part at the sum of the chosen scores. "slices" cuts these neurons into the experts, which keeps the size and
breaks the symmetry of copies; gates are then "share", one on average.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ..formats.base import StrictParams
from ..runtime.moe import Gate
from .base import FeedForward, Split, parted, random_router

NEEDS: tuple[str, ...] = ()
BALANCE_OVER = "sum"


class Params(StrictParams):
    """`upcycle`: what a routed expert holds; `std` of the router's weights (0.02 in `upcycle.py`)."""

    upcycle: Literal["slices", "copies"] = "slices"
    std: float = Field(0.02, gt=0)

    @property
    def copies(self) -> bool:
        return self.upcycle == "copies"


def gate(params: Params) -> Gate:
    """The gate when none is asked for."""
    return "norm" if params.copies else "share"


def split(layer: FeedForward, params: Params) -> Split:
    """Neurons in their own order, whose places mean nothing; copies all hold the same."""
    order = torch.arange(layer.down.shape[1], device=layer.down.device)
    if params.copies:
        shared, rest = order[: layer.spec.shared], order[layer.spec.shared :]
        return Split(shared, [rest] * layer.spec.experts, *random_router(layer, params.std))
    return Split(*parted(layer, order), *random_router(layer, params.std))
