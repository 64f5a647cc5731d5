"""moh: heads of self-attention as experts (arXiv 2410.11842; SkyworkAI/MoH). runtime/heads.py says how they run.

`score` "query" is the conversion of a trained model (MoH-LLaMA3): no new weights, a token takes the routed heads in
which its query is longest. "learned" has the gates of the models trained from scratch, which start equal: all tokens
then take the first routed heads until training separates them.

By default half of the heads are shared and half of the others active, 75 % in all. The paper shares the first half of
the heads; here they are those with the largest Taylor score. `--shared` and `--active` count heads. The balance loss is
that of the other methods, 1 at even use, where the paper's is the number of active heads. In joint attentions a head
belongs to both streams; a token of either chooses by its own query.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import DitcompressError
from ..formats.base import StrictParams
from ..models.base import Layout
from ..routed import RoutedPart, routable_attentions
from ..runtime.heads import Score
from ..runtime.moe import Routed
from .base import Importance, Numbers

NEEDS = ("heads",)
NUMBERS = Numbers(experts=None, shared=None, active=None)


class Params(StrictParams):
    """`score`: what chooses heads."""

    score: Score = "query"


def routed(
    model: nn.Module, layout: Layout, numbers: Numbers, params: Params, importance: Importance
) -> dict[str, RoutedPart]:
    """The heads of every self-attention that is known; without scores the first ones are shared."""
    found = {}
    for path, axis in routable_attentions(model, layout).items():
        heads = layout.axes[axis].size // layout.axes[axis].unit_size
        shared = heads // 2 if numbers.shared is None else numbers.shared
        active = (heads - shared + 1) // 2 if numbers.active is None else numbers.active
        if numbers.experts not in (None, heads):
            what = f"{path} has {heads} heads"
            raise DitcompressError("E203", f"--experts {numbers.experts}", what, "leave --experts out")
        if not 0 <= shared < heads:
            raise DitcompressError("E203", f"--shared {shared}", f"leaves no routed one of {heads} heads", "give fewer")
        if not (0 if shared else 1) <= active <= heads - shared:
            what = f"{heads - shared} of {heads} heads are routed, {active} cannot run"
            raise DitcompressError("E203", f"--active {active}", what, f"give 1 to {heads - shared}")
        score = importance.get(path)
        order = list(range(heads)) if score is None else score.argsort(descending=True, stable=True).tolist()
        found[path] = RoutedPart(
            kind="heads", count=heads - shared, active=active, shared=sorted(order[:shared]), score=params.score
        )
    if not found:
        what = "has no self-attention whose call is known here"
        raise DitcompressError("E205", type(model).__name__, what, "use a method of feed-forwards, as moe-best")
    return found


def begin(part: Routed, params: Params, generator: torch.Generator) -> None:
    """Gates of trained scores start at zero, which gives every shared and chosen head a gate of one."""
