"""Clusters of tokens that a linear router tells apart: the nearest of several centres is the largest of the logits
c . x - |c|^2 / 2, plus what a cluster with too few tokens gets on top."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

ROUNDS = 25  # of k-means
LIFTS = 400  # at most, of the clusters that are too small
LIFT = 0.01  # of the mean squared distance of a token to its centre


def clustered(
    tokens: Tensor, weights: Tensor, count: int, floor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Router weight (count, D) and bias (count,): weighted k-means of tokens (T, D). Each cluster has at least `floor`
    of an even share of the tokens (counted alike, as the load of an expert is), as far as a bias can bring that."""
    centres = _start(tokens, weights, count, generator)
    for _ in range(ROUNDS):
        chosen = linear(tokens, *_router(centres)).argmax(1)
        mass = torch.zeros(count, device=tokens.device).index_add_(0, chosen, weights)
        sums = torch.zeros_like(centres).index_add_(0, chosen, tokens * weights[:, None])
        centres = torch.where(mass[:, None] > 0, sums / mass.clamp_min(1e-30)[:, None], centres)
    weight, bias = _router(centres)
    logits = linear(tokens, weight, bias)
    distance = (tokens.square().sum(1) - 2 * logits.max(1).values).clamp_min(0).mean()
    lift = torch.zeros_like(bias)
    for _ in range(LIFTS):
        low = torch.bincount((logits + lift).argmax(1), minlength=count) < floor * len(tokens) / count
        if not bool(low.any()):
            break
        lift = lift + LIFT * distance * low
    return weight, bias + lift


def _router(centres: Tensor) -> tuple[Tensor, Tensor]:
    return centres, -centres.square().sum(1) / 2


def _start(tokens: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn one after the other, likelier the farther they are from those drawn (k-means++)."""
    place = int(torch.randint(len(tokens), (1,), generator=generator))
    centres = tokens[place : place + 1]
    for _ in range(count - 1):
        far = torch.cdist(tokens, centres).amin(1).square() * weights
        total = (far.double().cumsum(0) if float(far.sum()) > 0 else torch.ones_like(far).double().cumsum(0)).cpu()
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        place = min(int(torch.searchsorted(total, drawn)), len(tokens) - 1)
        centres = torch.cat([centres, tokens[place : place + 1]])
    return centres
