"""moe-local: ours, without training. Each expert is the feed-forward pruned for the tokens of one cluster.

A feed-forward of half the neurons is a poor stand-in for all tokens and a good one for tokens that are alike. Tokens
are clustered (their modulation by time and condition clusters them too), the router is the nearest centre, one expert
runs for a token, and each is what optimal brain surgeon (surgeon.py) leaves of the dense layer on the tokens of its
cluster: its own neurons, its own compensated output weights, its own bias. Experts hold neurons that others hold too,
so what is stored grows to experts * share of the dense feed-forwards, while a token meets `share` of their neurons.

An error is counted by what it costs the images: the sensitivity of the model's output to the token, times the
influence of the prediction on the clean image at its timestep. Costs of all layers have one unit, so layers share
their neurons (`scope` global): a layer that needs more gets more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ..errors import DitcompressError
from ..experts import ExpertLayer
from ..formats.base import StrictParams
from ..surgeon import Surgeon, refitted, turns
from ._clusters import clustered
from .base import FeedForward, Numbers, Split

NEEDS = ("weighed",)
NUMBERS = Numbers(8, 0, 1)
PART = 4096  # tokens
LEAST, MOST = 1 / 16, 31 / 32  # of a layer's neurons, with `scope` global


class Params(StrictParams):
    """`share` of the neurons that a token meets; `scope` global: layers share their neurons; `floor`: tokens of the
    smallest cluster, of an even share; `states` and `tokens` of the calibration; `damp` and `rounds` as obs-diff's;
    `grain`: in how many parts a layer's neurons are given out."""

    share: float = Field(0.5, gt=0, lt=1)
    scope: Literal["global", "local"] = "global"
    floor: float = Field(0.5, ge=0, lt=1)
    states: int = Field(2048, ge=1)
    tokens: int = Field(32768, ge=16)
    damp: float = Field(1e-3, gt=0)
    rounds: int = Field(128, ge=1)
    grain: int = Field(32, ge=1)


@dataclass(frozen=True)
class Prepared:
    """Router (E, D), (E,) of a layer, and for each expert the error (E, H) that a neuron adds when it goes."""

    weight: Tensor
    bias: Tensor
    scores: Tensor

    def costs(self) -> Tensor:
        """Error (H,) of all experts that keep 1 to H neurons."""
        rising = self.scores.sort(dim=1).values[:, :-1]  # the last neuron never goes
        gone = torch.cat([torch.zeros_like(rising[:, :1]), rising.cumsum(1)], dim=1)
        return gone.sum(0).flip(0)


def layers(sizes: Mapping[str, int], numbers: Numbers, params: Params) -> dict[str, ExpertLayer]:
    """The expert layers of feed-forwards with so many neurons, before anything is measured. E203 for other numbers
    than one active expert and none shared."""
    experts = numbers.experts or 0
    for name, given, wanted in (("shared", numbers.shared, 0), ("active", numbers.active, 1)):
        if given != wanted:
            remedy = f"give {wanted}, and --set method.share=0.5 for half of the neurons"
            raise DitcompressError("E203", f"--{name} {given}", f"moe-local takes {wanted} alone", remedy)
    if experts < 2:
        raise DitcompressError("E203", f"--experts {experts}", "leaves nothing to route", "give 2 or more")
    return {
        path: ExpertLayer(0, experts, max(1, round(size * params.share)), 1, offset=True, of=size)
        for path, size in sizes.items()
    }


def sized(specs: Mapping[str, ExpertLayer], prepared: Mapping[str, Prepared], params: Params) -> dict[str, ExpertLayer]:
    """The same layers with neurons where they save most: as many in all, or less than a part more."""
    if params.scope == "local":
        return dict(specs)
    parts = {path: max(1, spec.of // params.grain) for path, spec in specs.items()}
    counts = {path: max(1, round(spec.of * LEAST)) for path, spec in specs.items()}
    costs = {path: found.costs() for path, found in prepared.items()}
    left = sum(spec.width for spec in specs.values()) - sum(counts.values())

    def gain(path: str) -> float:
        have, part = counts[path], parts[path]
        return float(costs[path][have - 1] - costs[path][have + part - 1]) / part

    while True:
        open_ = [p for p, part in parts.items() if part <= left and counts[p] + part <= MOST * specs[p].of]
        if not open_:
            return {path: replace(spec, width=counts[path]) for path, spec in specs.items()}
        best = max(open_, key=gain)
        counts[best] += parts[best]
        left -= parts[best]


def prepare(layer: FeedForward, params: Params) -> Prepared:
    """Clusters, and the order in which the neurons of each expert go."""
    assert layer.weights is not None
    weight, bias = clustered(layer.tokens, layer.weights, layer.spec.experts, params.floor, layer.generator)
    chunk = max(1, layer.spec.of // params.rounds)
    target = _target(layer)
    scores = [
        turns([Surgeon(target, gram, params.damp)], layer.spec.of, 1, chunk) for gram in _grams(layer, weight, bias)
    ]
    return Prepared(weight, bias, torch.stack(scores))


def split(layer: FeedForward, params: Params) -> Split:
    """Every expert's neurons with their output weights and bias."""
    found: Prepared = layer.prepared or prepare(layer, params)
    target, count = _target(layer), layer.spec.of
    experts, downs, own = [], [], []
    for score, gram in zip(found.scores, _grams(layer, found.weight, found.bias), strict=True):
        kept = score.argsort(descending=True, stable=True)[: layer.spec.width].sort().values.to(target.device)
        new = refitted(target, gram, torch.cat([kept, kept.new_tensor([count])]), params.damp)
        experts.append(kept)
        downs.append(new[:, kept].float())
        own.append(new[:, count].float())
    offsets = -torch.stack(own)
    return Split(
        torch.zeros(0, dtype=torch.long), experts, found.weight, found.bias, offsets, None, -offsets.sum(0), downs
    )


def _target(layer: FeedForward) -> Tensor:
    """Output weights beside the change of the bias, (D, H + 1) float64."""
    return torch.cat([layer.down, torch.zeros_like(layer.down[:, :1])], dim=1).double()


def _grams(layer: FeedForward, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """Of the hidden values and a constant (H + 1, H + 1) float64, over the tokens of each cluster; one at a time, as
    those of all experts are large. Sums of PART tokens are float32: the damping is far above their rounding."""
    assert layer.weights is not None
    chosen, size = linear(layer.tokens, weight, bias).argmax(1), layer.hidden.shape[1] + 1
    for number in range(layer.spec.experts):
        gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
        for own in (chosen == number).nonzero()[:, 0].split(PART):
            x = torch.nn.functional.pad(layer.hidden[own], (0, 1), value=1.0)
            x = x * layer.weights[own, None].sqrt()
            gram += x.T @ x
        yield gram
