"""moe-best: ours, without training. Neurons that fire together become one expert, under the router that will choose it.

Four steps, all on calibration tokens (which are modulated by time and condition, so the router is timestep-aware
without a second input):

1. Neurons are clustered by co-activation: the energy |h_j - mean|^2 |w_j|^2 of every neuron over tokens, balanced
   k-means (as MoEfication, arXiv 2110.01786, does with activation patterns). The neurons of most energy are shared.
2. The router is fitted in closed form: ridge regression from the token to the norm of each expert's output.
3. Given what the router chooses, every neuron goes where its energy is kept most (a balanced assignment, the shared
   expert included); 2 and 3 alternate, and the best state seen is kept.
4. The output weights of all experts are fitted to what the dense layer gives, under the routing (_refit.py). The layer
   is then nearer to the dense one as it runs, and no longer equal to it with all experts active; `refit: false` keeps
   that, for running with other numbers of active experts.

A token that does not reach an expert loses its output, but not its mean: the mean over such tokens goes into the
layer's bias, and an expert that runs takes it away again. With all experts active, and before step 4, the
layer is the dense one.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams
from ._assign import balanced, kmeans
from ._refit import refitted
from .base import FeedForward, Split, chosen_mask, outputs, ridge

NEEDS = ("tokens",)


class Params(StrictParams):
    """`rounds` of router and assignment; `target` of the router's regression: the norm of each expert's output,
    its share of the energy, the energy, or its logarithm; `damp` of the regression; `offsets`: whether means stay;
    `refit`: whether the output weights are fitted anew (step 4; it needs the offsets)."""

    rounds: int = Field(4, ge=0)
    target: Literal["norm", "share", "energy", "log"] = "norm"
    damp: float = Field(0.01, gt=0)
    offsets: bool = True
    refit: bool = True


def split(layer: FeedForward, params: Params) -> Split:
    """The split of all rounds with the least output error: on held-out tokens where weights are fitted anew."""
    mean = layer.hidden.mean(0) if params.offsets else torch.zeros_like(layer.hidden[0])
    energy = (layer.hidden - mean).square() * layer.down.square().sum(0)  # (T, H)
    group = _start(layer, energy)
    best, least = None, float("inf")
    for _ in range(params.rounds + 1):
        found, mask = _fitted(layer, group, params)
        error = _error(layer, found, mask)
        if params.refit and params.offsets:
            found, error = refitted(layer, found)
        if error < least:
            best, least = found, error
        group = _reassigned(layer, energy, mask)
    assert best is not None
    return best


def _start(layer: FeedForward, energy: Tensor) -> Tensor:
    """Group of every neuron: 0 for the shared expert, then the experts."""
    spec = layer.spec
    order = energy.sum(0).argsort(descending=True, stable=True)
    group = torch.zeros(len(order), dtype=torch.long, device=order.device)
    rest = order[spec.shared :]
    group[rest] = 1 + kmeans(energy[:, rest].sqrt().T, spec.experts, layer.generator)
    return group


def _members(layer: FeedForward, group: Tensor) -> tuple[Tensor, list[Tensor]]:
    return (group == 0).nonzero()[:, 0], [(group == 1 + e).nonzero()[:, 0] for e in range(layer.spec.experts)]


def _fitted(layer: FeedForward, group: Tensor, params: Params) -> tuple[Split, Tensor]:
    """Router and offsets of a partition, and what the router chooses (T, E)."""
    shared, experts = _members(layer, group)
    found = outputs(layer, experts)  # (E, T, D)
    offsets = found.mean(1) if params.offsets else torch.zeros_like(found[:, 0])
    for _ in range(2 if params.offsets else 1):  # the mean of what is dropped, under the router that drops it
        weight, bias = ridge(layer.tokens, _target(found - offsets[:, None], params.target), params.damp)
        mask = chosen_mask(weight, bias, layer.tokens, layer.spec.active)
        if params.offsets:
            offsets = _dropped_means(found, mask)
    return Split(shared, experts, weight, bias, offsets if params.offsets else None), mask


def _target(found: Tensor, target: str) -> Tensor:
    """What the router's logits should be, (T, E)."""
    energy = found.square().sum(-1).T
    if target == "share":
        return energy / energy.sum(1, keepdim=True).clamp_min(1e-20)
    if target == "log":
        return energy.clamp_min(1e-12 * float(energy.mean()) + 1e-30).log()
    return energy if target == "energy" else energy.sqrt()


def _dropped_means(found: Tensor, mask: Tensor) -> Tensor:
    """Mean output (E, D) of each expert over the tokens that do not reach it; over all where there are none."""
    dropped = (~mask).T.float()[:, :, None]
    count = dropped.sum(1)
    return torch.where(count > 0, (found * dropped).sum(1) / count.clamp_min(1), found.mean(1))


def _error(layer: FeedForward, split: Split, mask: Tensor) -> float:
    """Squared error of the layer's output over the calibration tokens."""
    found = outputs(layer, split.experts)
    offsets = 0 if split.offsets is None else split.offsets[:, None]
    lost = ((found - offsets) * (~mask).T[:, :, None]).sum(0)
    return float(lost.double().square().sum())


def _reassigned(layer: FeedForward, energy: Tensor, mask: Tensor) -> Tensor:
    """Neurons where their energy over the tokens that reach the group is largest; all tokens reach the shared one."""
    spec = layer.spec
    kept = torch.cat([energy.sum(0)[:, None], energy.T @ mask.float()], dim=1)
    sizes = [spec.shared, *[spec.width] * spec.experts]
    if not spec.shared:
        return 1 + balanced(kept[:, 1:], sizes[1:])
    return balanced(kept, sizes)
