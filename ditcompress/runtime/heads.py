"""Attention heads as experts: which heads a token meets. runtime/attention.py runs them.

Tokens choose heads (MoH, arXiv 2410.11842): shared heads always count; of the routed ones a token takes a few, and the
others neither attend for it nor reach the output. Keys and values of every head are needed by all tokens.

Heads choose tokens (UoE, arXiv 2503.02495): a group of heads takes the tokens that it scores highest and attends among
these alone, so that queries, keys, values and outputs of other tokens are not computed.

A joint attention has two streams with linears of their own. Heads are experts of both; each stream is routed, and its
use evened out, apart from the other, as tokens of text and image are not to be compared: `added` weighs the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .moe import Routed, Router, Routing, assignments, share_of, straight_through

Score = Literal["query", "learned"]


class HeadGates(nn.Module):
    """The trained gates of one stream: of routed heads, of shared ones, and between both."""

    def __init__(self, features: int, routed: int, shared: int) -> None:
        super().__init__()
        self.router = Router(features, routed)
        self.within = Router(features, max(1, shared))
        self.between = Router(features, 2)


class HeadRouter(Routed):
    """Belongs to an attention module. `shared`: indices of the heads that always count; of the others `active` do.

    `score` "query": a head's probability is the softmax over heads of the norm of the token's query there, in units of
    its standard deviation, and a chosen head counts fully (the conversion of a trained model: no new weights).
    "learned": three linear maps of the token from zero (training from scratch): gates of the routed heads active * p /
    sum of the chosen p, of the shared ones their number times a softmax, and two weights that add up to 2.
    `added`: width of the tokens of a second stream, 0 for none.
    """

    def __init__(
        self, features: int, heads: int, shared: Sequence[int], active: int, score: Score, added: int = 0
    ) -> None:
        super().__init__()
        self.shared, self.score = tuple(shared), score
        self.routed = tuple(h for h in range(heads) if h not in set(shared))
        self.count, self.active = len(self.routed), active
        if score == "learned":
            gates = HeadGates(features, self.count, len(self.shared))
            self.router, self.within, self.between = gates.router, gates.within, gates.between
            if added:
                self.added = HeadGates(added, self.count, len(self.shared))

    def route(self, tokens: Tensor, queries: Tensor, added: bool = False) -> Routing:
        """The routed heads of tokens (n, D) with queries (n, heads, width); `added`: tokens of the second stream."""
        own = self.added if added and self.score == "learned" else self
        if self.score == "learned":
            probabilities = own.router(tokens).softmax(-1)
        else:
            norm = queries[:, list(self.routed)].float().norm(dim=-1)
            probabilities = (norm / norm.std(-1, keepdim=True).clamp_min(1e-12)).softmax(-1)
        order = probabilities.argsort(dim=-1, descending=True, stable=True)  # ties by index
        chosen = order[:, : self.active]
        top = probabilities.gather(1, chosen)
        gates = straight_through(top)
        if self.score == "learned":
            gates = self.active * top / top.sum(-1, keepdim=True).clamp_min(1e-20)
            gates = gates * own.between(tokens).softmax(-1)[:, 1:] * 2
        return self.tell(Routing(probabilities, chosen, gates))

    def shared_gates(self, tokens: Tensor, added: bool = False) -> Tensor | None:
        """(n, shared) for tokens (n, D); None where all are one."""
        if self.score == "query" or not self.shared:
            return None
        own = self.added if added else self
        gates = len(self.shared) * own.within(tokens).softmax(-1)
        return gates * own.between(tokens).softmax(-1)[:, :1] * 2 if self.count else gates

    def extra_repr(self) -> str:
        return f"{len(self.shared)} shared, {self.active} of {self.count} routed, by {self.score}"


class GroupRouter(Routed):
    """Belongs to an attention module: `count` groups of heads, each of which takes the share `active / count` of a
    sample's tokens (at least one) in every stream. Every group has the same load, so nothing has to be balanced.
    `added`: width of the tokens of a second stream, 0 for none."""

    balanced = False

    def __init__(self, features: int, groups: int, active: int, added: int = 0) -> None:
        super().__init__()
        self.count, self.active = groups, active
        self.router = Router(features, groups)
        if added:
            self.added = Router(added, groups)

    def route(self, x: Tensor, added: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens (n, groups, t) that each group takes of x (n, T, D), in their order, and gates of one."""
        probabilities = (self.added if added else self.router)(x).softmax(-1)
        taken = share_of(x.shape[1], self.active, self.count)
        chosen = probabilities.transpose(1, 2).topk(taken, dim=-1).indices.sort(dim=-1).values
        self.tell(Routing(probabilities.flatten(0, 1), assignments(chosen, x.shape[1]), torch.ones(0)))
        return chosen, straight_through(probabilities.transpose(1, 2).gather(2, chosen))

    def extra_repr(self) -> str:
        return f"{self.count} groups, each takes {self.active} of {self.count} tokens"
