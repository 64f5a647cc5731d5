"""Magnitude: the mean absolute weight of a unit's matrices. Needs no data, reads every weight once.

The baseline of pruning since Han et al. 2015 (arXiv 1506.02626, section 3), applied to whole blocks.
"""

from __future__ import annotations

from pydantic import Field

from ..offload import loaded
from .base import Context, Scores, StrictParams

NEEDS: tuple[str, ...] = ()


class Params(StrictParams):
    """`power`: 1 for mean |w|, 2 for mean w^2."""

    power: float = Field(1.0, gt=0)


def scores(context: Context, params: Params) -> Scores:
    """Mean |w|^power over all matrices of the unit, accumulated in float64."""
    values = {}
    for name in context.names:
        total, count = 0.0, 0
        for block in context.blocks(name):
            for path, part in context.model.get_submodule(block).named_modules(prefix=block):
                with loaded(context.model, path, deep=False):
                    for weight in part.parameters(recurse=False):
                        if weight.ndim > 1:
                            total += float(weight.detach().double().abs().pow(params.power).sum())
                            count += weight.numel()
        values[name] = total / max(count, 1)
    return Scores(values)
