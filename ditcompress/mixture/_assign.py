"""Balanced assignment of neurons to groups of fixed sizes, and k-means with equal clusters on top of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balanced(benefit: Tensor, sizes: Sequence[int]) -> Tensor:
    """Group (H,) of every neuron that nearly maximises the sum of `benefit` (H, G) with `sizes[g]` neurons in group g.

    Neurons with the most to lose choose first; then pairs of groups exchange neurons while that gains.
    """
    value, left = benefit.double().cpu(), list(sizes)
    best, second = value.topk(min(2, value.shape[1]), dim=1).values[:, [0, -1]].T
    group = torch.empty(len(value), dtype=torch.long)
    for neuron in (best - second).argsort(descending=True, stable=True).tolist():
        open_ = [g for g, room in enumerate(left) if room]
        mine = max(open_, key=lambda g: float(value[neuron, g]))
        group[neuron] = mine
        left[mine] -= 1
    return _exchanged(value, group).to(benefit.device)


def _exchanged(value: Tensor, group: Tensor, rounds: int = 4) -> Tensor:
    """Swap neurons between pairs of groups while the sum of both gains is positive."""
    count = value.shape[1]
    for _ in range(rounds):
        moved = 0
        for a in range(count):
            for b in range(a + 1, count):
                ours, theirs = (group == a).nonzero()[:, 0], (group == b).nonzero()[:, 0]
                gain_a, order_a = (value[ours, b] - value[ours, a]).sort(descending=True)
                gain_b, order_b = (value[theirs, a] - value[theirs, b]).sort(descending=True)
                least = min(len(ours), len(theirs))
                swaps = int((gain_a[:least] + gain_b[:least] > 1e-12).sum())
                group[ours[order_a[:swaps]]], group[theirs[order_b[:swaps]]] = b, a
                moved += swaps
        if not moved:
            break
    return group


def kmeans(features: Tensor, groups: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """Group (H,) of every row of `features` (H, T), all of one size (H must be a multiple): spherical k-means."""
    rows = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)
    first = torch.randperm(len(rows), generator=generator)[:groups]
    centres, group = rows[first.to(rows.device)], torch.full((len(rows),), -1, device=rows.device)
    for _ in range(rounds):
        found = balanced(rows @ centres.T, [len(rows) // groups] * groups)
        if torch.equal(found, group):
            break
        group = found
        centres = torch.stack([rows[group == g].mean(0) for g in range(groups)])
        centres = centres / centres.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return group
