"""Random: units in a random order that the seed decides. The floor that every other method has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.base import Axis
from ._axes import count_of
from .base import Context, WidthParams

NEEDS: tuple[str, ...] = ()


class Params(WidthParams):
    """No parameters but the scope: `--seed` decides."""


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """Uniform numbers, (units,)."""
    generator = torch.Generator().manual_seed(context.seed)
    return {axis.name: torch.rand(count_of(axis), generator=generator, dtype=torch.float64) for axis in axes}
