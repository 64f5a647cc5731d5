"""LAPTOP-Diff (Zhang et al. 2024, arXiv 2404.11098): the output loss of every single removal, summed, as a knapsack.

Removing several layers hurts the output by about the sum of the single damages, so each is measured once and the set
of least total damage that saves the target is found exactly. Here the candidates are whole blocks (what stock
diffusers can load without a part of), the loss is the error of the noise or velocity prediction on the model's own
trajectories, and guidance branches count alike. No official code exists; the paper averages over random timesteps,
here they are those of the sampler, weighted as it uses them (`weighted: false`: all alike).
"""

from __future__ import annotations

from ._knapsack import lightest
from .base import Context, ProbeParams, Scores

NEEDS = ("probes", "journal")


class Params(ProbeParams):
    """`weighted`: timesteps count as strongly as the sampler uses their prediction."""

    weighted: bool = True


def scores(context: Context, params: Params) -> Scores:
    """Share of the prediction's energy that is wrong without each unit."""
    curves, values = {}, {}
    times = context.times()
    with context.reporter.task("single removals", len(context.names)) as advance:
        for name in context.names:
            noise, signal = context.remembered("errors", [name], lambda name=name: context.errors([name]))  # type: ignore[misc]
            weights = [probe.weight if params.weighted else 1.0 for probe in context.probes]
            total = sum(w * s for w, s in zip(weights, signal, strict=True))
            values[name] = sum(w * n for w, n in zip(weights, noise, strict=True)) / max(total, 1e-300)
            sums = {time: [0.0, 0.0] for time in times}
            for probe, n, s in zip(context.probes, noise, signal, strict=True):
                entry = sums[float(probe.timestep[0])]
                entry[0], entry[1] = entry[0] + n, entry[1] + s
            curves[name] = [n / max(s, 1e-300) for n, s in sums.values()]
            advance(1)
    return Scores(values, curves, times)


def select(context: Context, params: Params, scores: Scores) -> list[str]:
    """The knapsack over the units' costs; a list that would be emptied keeps its most important unit."""
    keep: set[str] = set(scores.keep)
    while True:
        names = [name for name in context.names if name not in keep]
        costs = [context.costs[name] for name in names]
        least = context.target - min(context.costs.values(), default=0.0) / 2
        chosen = [names[i] for i in lightest([scores.values[n] for n in names], costs, least)]
        gone = {block for name in chosen for block in context.blocks(name)}
        empty = [o for o, n in context.depth.lists.items() if n and sum(b.rpartition(".")[0] == o for b in gone) == n]
        if not empty:
            return chosen
        last = [n for n in chosen if any(b.rpartition(".")[0] in empty for b in context.blocks(n))]
        keep.add(max(last, key=lambda name: scores.values[name]))
