"""Weighted k-means for codebooks of short vectors: seeded, and no cluster stays empty."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 24  # of a distance matrix at a time
_SAMPLE = 1 << 16  # vectors that k-means++ looks at


def nearest(vectors: Tensor, weights: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest entry, int64 (M,), and the squared distance to it, (M,).

    vectors, weights: (M, d); codebook: (C, d). The distance is sum(weights * (vector - entry)**2).
    """
    constant = (weights * vectors.square()).sum(1)
    right = torch.cat([codebook.square(), -2 * codebook], 1).T
    index = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    distance = torch.empty_like(constant)
    step = max(1, _ELEMENTS // len(codebook))
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        left = torch.cat([weights[part], weights[part] * vectors[part]], 1)
        least, index[part] = (left @ right).min(1)
        distance[part] = least + constant[part]
    return index, distance.clamp_min(0)


def _plus_plus(vectors: Tensor, weights: Tensor, count: int, random: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each new entry is drawn in proportion to its squared distance."""
    entries = torch.empty(count, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    distance = torch.full_like(vectors[:, 0], float("inf"))
    chosen = int(torch.randint(len(vectors), (1,), generator=random))
    for i in range(count):
        entries[i] = vectors[chosen]
        distance = torch.minimum(distance, (weights * (vectors - entries[i]).square()).sum(1))
        total = distance.cumsum(0)
        draw = torch.rand(1, generator=random).to(total) * total[-1]  # all zero: the first vector again
        chosen = min(int(torch.searchsorted(total, draw)), len(vectors) - 1)
    return entries


def _start(vectors: Tensor, weights: Tensor, count: int, init: str, random: torch.Generator) -> Tensor:
    order = torch.randperm(len(vectors), generator=random).to(vectors.device)
    if init == "random":
        return vectors[order[torch.arange(count, device=vectors.device) % len(order)]]
    sample = order[: max(_SAMPLE, count)]
    return _plus_plus(vectors[sample], weights[sample], count, random)


def _means(vectors: Tensor, weights: Tensor, index: Tensor, codebook: Tensor) -> Tensor:
    """Weighted means of the clusters; an entry whose cluster has no weight stays."""
    total = torch.zeros_like(codebook).index_add_(0, index, weights)
    summed = torch.zeros_like(codebook).index_add_(0, index, weights * vectors)
    return torch.where(total > 0, summed / total.clamp_min(torch.finfo(total.dtype).tiny), codebook)


def sampled(vectors: Tensor, weights: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `most` of the vectors (M, d) and their weights, drawn without replacement."""
    if len(vectors) <= most:
        return vectors, weights
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:most].to(vectors.device)
    return vectors[order], weights[order]


def kmeans(vectors: Tensor, weights: Tensor, count: int, init: str, iterations: int, seed: int) -> Tensor:
    """A codebook (count, d) of vectors (M, d) under `weights` (M, d): the best one seen in `iterations` rounds.

    Entries of empty clusters move to the vectors that are worst represented.
    """
    random = torch.Generator().manual_seed(seed)
    codebook = _start(vectors, weights, count, init, random)
    best, least = codebook, float("inf")
    for _ in range(iterations + 1):
        index, distance = nearest(vectors, weights, codebook)
        error = distance.double().sum().item()
        if error < least:
            best, least = codebook, error
        elif not error < least:  # settled
            break
        moved = _means(vectors, weights, index, codebook)
        empty = (torch.bincount(index, minlength=count) == 0).nonzero()[:, 0]
        worst = distance.topk(min(len(empty), len(distance))).indices
        moved[empty[: len(worst)]] = vectors[worst]
        codebook = moved
    return best
