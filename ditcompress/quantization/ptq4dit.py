"""PTQ4DiT (Wu et al., NeurIPS 2024, arXiv 2405.16005): channel-wise salience balancing over timesteps.

CSB: s = sqrt(a / w) with a and w the channel maxima of input and weight, after which both are sqrt(a w). SSC: a is the
mean of the maxima of each timestep with weights softmax(-rho), rho the rank correlation of that step's maxima with
the weight's, so that steps which disagree with the weight count more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.base import StrictParams
from .base import Group

NEEDS = ("range",)
SMALLEST = 1e-5


class Params(StrictParams):
    """No parameters."""


def spearman(rows: Tensor, other: Tensor) -> Tensor:
    """Rank correlation of each row of (n, k) with `other` (k,), shape (n,)."""
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1, stable=True).double()
    against = other.argsort(stable=True).argsort(stable=True).double()
    ranks, against = ranks - ranks.mean(1, keepdim=True), against - against.mean()
    return (ranks * against).sum(1) / (ranks.norm(dim=1) * against.norm()).clamp_min(1e-30)


def salience(by_step: Tensor, weight_max: Tensor) -> Tensor:
    """The input's channel maxima (k,) from those of each timestep (n, k)."""
    return (torch.softmax(-spearman(by_step, weight_max), 0)[:, None] * by_step.double()).sum(0).float()


def prepare(group: Group, params: Params) -> Tensor:
    statistics = group.statistics
    by_step = torch.maximum(statistics.high, -statistics.low).float()
    seen = torch.isfinite(by_step).all(1)  # a timestep bucket that met no token has no range
    weight_max = torch.stack([layer.weight.float().abs().amax(0) for layer in group.layers]).amax(0)
    found = salience(by_step[seen], weight_max).clamp_min(SMALLEST)
    return (found / weight_max.clamp_min(SMALLEST)).sqrt()
