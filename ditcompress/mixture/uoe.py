"""uoe: feed-forwards and self-attentions cut as tensor parallelism cuts them (arXiv 2503.02495; YujiaoYang-work/UoE).

Rows of the first linear with the columns of the second, and groups of heads with their columns of the output, are
experts whose sum is the dense layer. Experts choose their tokens: each takes the share `--active` / `--experts` of a
sample's tokens that its router scores highest, groups of heads attend among these alone. `choice` "token" lets tokens
choose the feed-forward experts instead. The paper routes the tokens of a batch together; here each sample is routed by
itself, so that results do not depend on what else is in a batch. In joint attentions a
group takes its share of each stream's tokens and attends among both.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from ..errors import DitcompressError
from ..formats.base import StrictParams
from ..models.base import Layout
from ..routed import RoutedPart, routable_attentions
from ..runtime.moe import Choice, Routed
from .base import FeedForward, Importance, Numbers, Split, parted, random_router

NEEDS: tuple[str, ...] = ()
NUMBERS = Numbers(experts=4, shared=0, active=2)


class Params(StrictParams):
    """`choice`: whether the feed-forward's experts choose tokens or tokens experts; `attention`: whether attentions are
    cut too; `std` of the routers' weights."""

    choice: Choice = "expert"
    attention: bool = True
    std: float = Field(0.02, gt=0)


def split(layer: FeedForward, params: Params) -> Split:
    """Consecutive neurons, as tensor parallelism has them."""
    order = torch.arange(layer.down.shape[1], device=layer.down.device)
    return Split(*parted(layer, order), *random_router(layer, params.std))


def routed(
    model: nn.Module, layout: Layout, numbers: Numbers, params: Params, importance: Importance
) -> dict[str, RoutedPart]:
    """Groups of heads of every self-attention that is known, as many as there are routed experts of a feed-forward."""
    if not params.attention:
        return {}
    assert numbers.experts is not None and numbers.shared is not None and numbers.active is not None
    groups = numbers.experts - numbers.shared
    found = {}
    for path, axis in routable_attentions(model, layout).items():
        heads = layout.axes[axis].size // layout.axes[axis].unit_size
        if heads % groups or not numbers.active:
            what = f"{groups} routed experts do not divide the {heads} heads of {path}"
            raise DitcompressError("E203", f"--experts {numbers.experts}", what, "or --set method.attention=false")
        found[path] = RoutedPart(kind="groups", count=groups, active=numbers.active)
    return found


def begin(part: Routed, params: Params, generator: torch.Generator) -> None:
    """Routers of the groups at random."""
    weight = part.router.weight
    weight.copy_(torch.randn(weight.shape, generator=generator) * params.std)
