"""Oracle-greedy (ours): the unit whose removal hurts the output least goes, then all the others are measured again.

Single damages do not add up: two neighbours often do the same work, and the second of them to go costs far more than
it did alone. Measuring again after every removal sees that. n units and k removals take about k (n - k / 2) sweeps
over the probes; the damage is the sampler-weighted share of wrong energy in the prediction. Where units cost
differently, damage added for each unit of cost decides.
"""

from __future__ import annotations

from ._greedy import greedy
from .base import Context, ProbeParams, Scores
from .laptop_diff import Params as LaptopParams
from .laptop_diff import scores as single_removals

NEEDS = ("probes", "journal")


class Params(ProbeParams):
    """No parameters of its own."""


def scores(context: Context, params: Params) -> Scores:
    """Damage of each single removal: the first round of the search."""
    return single_removals(context, LaptopParams())


def select(context: Context, params: Params, scores: Scores) -> list[str]:
    """Units in the order in which they go."""
    return greedy(context, scores, "damage", context.damage)
