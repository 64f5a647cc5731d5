"""FLUX.1-lite (Freepik 2024, model card): mean squared difference between a block's input and output.

The difference grows with the stream, so it can be compared only within one list of blocks. The card prunes one list;
here every list is divided by its own mean, so that a model of several lists has one ranking.
"""

from __future__ import annotations

from statistics import fmean

from ._streams import Streams, measured
from .base import Context, ProbeParams, Scores

NEEDS = ("probes",)


class Params(ProbeParams):
    """`relative`: divide by the mean of the block's list."""

    relative: bool = True


def difference(pairs: Streams) -> float:
    """Mean over all elements of all streams of (output - input)^2."""
    total = sum(float((y.float() - x.float()).double().square().sum()) for x, y in pairs)
    return total / max(sum(x.numel() for x, _ in pairs), 1)


def scores(context: Context, params: Params) -> Scores:
    """Mean squared difference of each unit, kept for every timestep."""
    table = measured(context, difference)
    if params.relative:
        owners = {block: block.rpartition(".")[0] for block in table}
        means = {
            owner: fmean(v for block in table if owners[block] == owner for v in table[block])
            for owner in set(owners.values())
        }
        table = {block: [v / max(means[owners[block]], 1e-300) for v in row] for block, row in table.items()}
    return context.average(table)
