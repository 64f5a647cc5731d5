"""dense2moe: the neurons that matter most make the shared expert, the rest the routed ones (arXiv 2510.09094, sec. 3).

Importance of a neuron is the Taylor score sum |dL/dw * w| over its weights. The paper does not say how the rest is
divided nor how the router starts: neurons are dealt in the order of their score, so that experts weigh alike, and the
router is the least-squares map from a token to the norm of each expert's output (`router: random` for N(0, std^2)).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..formats.base import StrictParams
from .base import FeedForward, Split, outputs, random_router, ridge

NEEDS = ("tokens", "importance")


class Params(StrictParams):
    """`router`: how it starts; `damp` of its regression; `std` of a random one."""

    router: Literal["norm", "random"] = "norm"
    damp: float = Field(0.01, gt=0)
    std: float = Field(0.02, gt=0)


def split(layer: FeedForward, params: Params) -> Split:
    """Shared neurons by score, the rest dealt round-robin."""
    spec = layer.spec
    assert layer.importance is not None
    order = layer.importance.argsort(descending=True, stable=True)
    rest = order[spec.shared :]
    experts = [rest[e :: spec.experts] for e in range(spec.experts)]
    if params.router == "random":
        return Split(order[: spec.shared], experts, *random_router(layer, params.std))
    norms = outputs(layer, experts).norm(dim=-1).T
    return Split(order[: spec.shared], experts, *ridge(layer.tokens, norms, params.damp))
