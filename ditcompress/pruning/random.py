"""Random: units in a random order that the seed decides. The floor that every other method has to beat."""

from __future__ import annotations

import torch

from .base import Context, Scores, StrictParams

NEEDS: tuple[str, ...] = ()


class Params(StrictParams):
    """No parameters: `--seed` decides."""


def scores(context: Context, params: Params) -> Scores:
    """A random permutation of 0 .. units - 1."""
    order = torch.randperm(len(context.names), generator=torch.Generator().manual_seed(context.seed))
    return Scores({name: float(place) for name, place in zip(context.names, order, strict=True)})
