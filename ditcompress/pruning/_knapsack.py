"""0/1 knapsack: the cheapest set of items that weighs at least a given amount."""

from __future__ import annotations

from collections.abc import Sequence

BINS = 10_000


def lightest(values: Sequence[float], weights: Sequence[float], least: float, bins: int = BINS) -> list[int]:
    """Indices of the set with the smallest sum of `values` (>= 0) whose `weights` add up to at least `least`.

    Dynamic programming over weights in `bins` steps, so a set may miss `least` by (items / bins) of the total at most;
    equal weights are exact. All items where even they do not reach it.
    """
    unit = sum(weights) / bins or 1.0
    if len(set(weights)) == 1:
        unit = weights[0] or 1.0
    sizes = [round(weight / unit) for weight in weights]
    need = max(0, min(sum(sizes), -int(-(least / unit - 1e-6) // 1)))
    best: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * (need + 1)
    best[0] = (0.0, ())
    for item, (value, size) in enumerate(zip(values, sizes, strict=True)):
        fresh = best[:]
        for reached in range(need + 1):
            before, chosen = best[max(0, reached - size)]
            if reached and before + value < fresh[reached][0]:
                fresh[reached] = (before + value, (*chosen, item))
        best = fresh
    return list(best[need][1])
