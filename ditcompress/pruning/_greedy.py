"""Greedy removal: the unit goes whose removal is measured to hurt least, then all the others are measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .base import Context, Scores


def greedy(
    context: Context, scores: Scores, kind: str, measure: Callable[[Sequence[str]], float], by_cost: bool = True
) -> list[str]:
    """Units in the order in which they go. `scores` are the measurements of single removals, `measure(units)` that of
    several, remembered as `kind`; with `by_cost` what a unit adds to it counts for each unit of cost."""
    removed: list[str] = []
    last = 0.0
    count = len(context.names)
    about = max(1, round(context.target / max(sum(context.costs.values()) / max(count, 1), 1e-300)))
    sweeps = sum(max(0, count - len(scores.keep) - gone) for gone in range(1, about))
    with context.reporter.task("greedy removals", max(1, sweeps)) as advance:
        while allowed := context.fitting(removed, scores.keep):
            trials = dict(scores.values)
            for name in allowed if removed else ():
                units = [*removed, name]
                trials[name] = context.remembered(kind, units, lambda units=units: measure(units))  # type: ignore[misc]
                advance(1, f"{len(units)} of {about}")
            best = min(
                allowed, key=lambda name: (trials[name] - last) / context.costs[name] if by_cost else trials[name]
            )
            removed.append(best)
            last = trials[best]
    return removed
