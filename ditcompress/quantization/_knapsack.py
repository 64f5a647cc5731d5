"""Choosing one of several stored forms for every linear under a budget of bits.

Every linear brings choices of (stored bits, expected damage). Choices that are not on the lower convex hull never pay;
the rest is bought in the order of damage avoided for each bit, which is optimal up to the last purchase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import LayerDecision


@dataclass(frozen=True)
class Choice:
    """One stored form: `bits` in total, `cost` the expected share of the output's energy that it damages."""

    bits: int
    cost: float
    decision: LayerDecision


@dataclass(frozen=True)
class Point:
    """A state on the way from the cheapest to the best: total bits, total cost, the choice of every linear."""

    bits: int
    cost: float
    places: tuple[int, ...]


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices worth having, from the fewest bits, with falling gain for each further bit."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.cost)):
        if kept and choice.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _gain(kept[-2], choice) >= _gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append(choice)
    return kept


def _gain(first: Choice, second: Choice) -> float:
    return (first.cost - second.cost) / max(second.bits - first.bits, 1)


def path(hulls: Sequence[Sequence[Choice]], budget: float = float("inf")) -> list[Point]:
    """Every state of buying in order of gain; what does not fit the budget is passed over, with all that follows it in
    the same linear. The last state is the choice for this budget."""
    steps = [
        (_gain(choices[k], choices[k + 1]), layer, k + 1)
        for layer, choices in enumerate(hulls)
        for k in range(len(choices) - 1)
    ]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    places = [0] * len(hulls)
    bits, cost = sum(c[0].bits for c in hulls), sum(c[0].cost for c in hulls)
    points = [Point(bits, cost, tuple(places))]
    for _, layer, place in steps:
        old, new = hulls[layer][places[layer]], hulls[layer][place]
        if places[layer] != place - 1 or bits + new.bits - old.bits > budget:
            continue
        places[layer] = place
        bits, cost = bits + new.bits - old.bits, cost + new.cost - old.cost
        points.append(Point(bits, cost, tuple(places)))
    return points
