"""The diffusion prior of Switch-DiT (section 3.3): which experts each timestep should use, and how far the gates are.

Prior: a window over all experts of all blocks, as wide as the share that is active, slides from the first to the last
as the timestep grows, by (t / (T - 1))^4: near timesteps share experts, few experts serve the many noisy ones.
Columns are matched to experts anew each time, so the prior orders no particular expert. The divergence is taken row by
row, each timestep being a distribution over experts, and averaged: the paper leaves the normalisation open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

STEPS, ALPHA = 1000, 4.0


def prior_map(steps: int, experts: int, active: int, alpha: float = ALPHA) -> Tensor:
    """Rows (steps, experts) with `active` ones each."""
    offset = ((torch.arange(steps) / max(1, steps - 1)) ** alpha * (experts - active)).round().long()
    columns = torch.arange(experts)
    return ((columns >= offset[:, None]) & (columns < offset[:, None] + active)).float()


def matched(choices: Tensor, prior: Tensor) -> Tensor:
    """`prior` (T, C) with its columns where they overlap most with the choices (T, C), one column an expert."""
    overlap = choices.T @ prior
    rows, columns = linear_sum_assignment(overlap.cpu().numpy(), maximize=True)
    found = torch.empty_like(prior)
    found[:, torch.as_tensor(rows)] = prior[:, torch.as_tensor(columns)]
    return found


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows, mean over them: 0 for equal ones, log 2 for disjoint ones."""
    p, q = (x / x.sum(1, keepdim=True).clamp_min(1e-20) for x in (p, q))
    middle = (p + q) / 2

    def from_middle(x: Tensor) -> Tensor:
        return (x * ((x.clamp_min(1e-20)) / middle.clamp_min(1e-20)).log()).sum(1)

    return ((from_middle(p) + from_middle(q)) / 2).mean()


def prior_loss(probabilities: Sequence[Tensor], active: int) -> Tensor:
    """Of the gates (T, experts) of every block over all timesteps, `active` of them chosen in each block."""
    every = torch.cat(list(probabilities), dim=1)
    choices = torch.cat([_top(p.detach(), active) for p in probabilities], dim=1)
    prior = prior_map(len(every), every.shape[1], active * len(probabilities)).to(every.device)
    return divergence(every, matched(choices, prior))


def _top(p: Tensor, active: int) -> Tensor:
    return torch.zeros_like(p).scatter_(1, p.topk(active, dim=1).indices, 1.0)
