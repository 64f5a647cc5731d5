"""Output weights fitted anew under the routing, with the damping that held-out tokens choose.

The experts that run make up for those that do not, as far as their hidden values can tell: one ridge regression of what
is lost, towards no change. Few tokens against many neurons would overfit, so a quarter of the tokens decides how far to
go, and no change at all is one of the choices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .base import FeedForward, Split, chosen_mask, outputs

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # in units of the mean squared feature
EVERY = 4  # the stride of held-out tokens


def refitted(layer: FeedForward, split: Split) -> tuple[Split, float]:
    """The split with new output weights, offsets and bias, and its squared error over the held-out tokens."""
    assert split.offsets is not None
    mask = chosen_mask(split.router_weight, split.router_bias, layer.tokens, layer.spec.active)
    lost = ((outputs(layer, split.experts) - split.offsets[:, None]) * (~mask).T[:, :, None]).sum(0)
    kept = layer.hidden.clone()
    for number, own in enumerate(split.experts):
        kept[:, own] *= mask[:, number, None]
    features = torch.cat([kept, mask.float()], dim=1)
    held = torch.arange(len(lost), device=lost.device) % EVERY == 0
    damping, error = _damping(features[~held], lost[~held], features[held], lost[held])
    if damping is None:
        return split, error
    weight, bias = Ridge(features, lost).solve(damping)
    count = kept.shape[1]
    change = weight[:, count:]  # of an expert that runs, (D, E)
    offsets = split.offsets - change.T
    return replace(split, down=layer.down + weight[:, :count], offsets=offsets, shift=bias + change.sum(1)), error


def _damping(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> tuple[float | None, float]:
    """The damping with the least held-out error, None for no change, and that error."""
    best, least = None, float(held_y.double().square().sum())
    if len(x) < 2:
        return best, least
    fit = Ridge(x, y)
    for damping in DAMPINGS:
        weight, bias = fit.solve(damping)
        error = float((held_y - held_x @ weight.T - bias).double().square().sum())
        if error < least:
            best, least = damping, error
    return best, least


class Ridge:
    """Least squares from x (T, F) to y (T, D) for any damping after one decomposition of the smaller Gram matrix."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.mean_x, self.mean_y = x.double().mean(0), y.double().mean(0)
        self.x, self.y = x.double() - self.mean_x, y.double() - self.mean_y
        self.wide = x.shape[0] < x.shape[1]
        gram = self.x @ self.x.T if self.wide else self.x.T @ self.x
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.scale = float(self.x.square().mean()) * len(x)
        self.projected = self.vectors.T @ (self.y if self.wide else self.x.T @ self.y)

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        """Weight (D, F) and bias (D,), float32."""
        shrunk = self.projected / (self.values.clamp_min(0) + max(damping * self.scale, 1e-30))[:, None]
        weight = (self.vectors @ shrunk).T if not self.wide else (self.x.T @ (self.vectors @ shrunk)).T
        return weight.float(), (self.mean_y - weight @ self.mean_x).float()
