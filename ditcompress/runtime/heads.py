"""Attention heads as experts: a processor for self-attention in which a token meets only some of the heads.

Tokens choose heads (MoH, arXiv 2410.11842): shared heads always count; of the routed ones a token takes a few, and the
others neither attend for it nor reach the output. Keys and values of every head are needed by all tokens.

Heads choose tokens (UoE, arXiv 2503.02495): a group of heads takes the tokens that it scores highest and attends among
these alone, so that queries, keys, values and outputs of other tokens are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ..errors import DitcompressError
from .moe import Routed, Router, Routing, assignments, share_of, straight_through

Score = Literal["query", "learned"]


class HeadRouter(Routed):
    """Belongs to an attention module. `shared`: indices of the heads that always count; of the others `active` do.

    `score` "query": a head's probability is the softmax over heads of the norm of the token's query there, in units of
    its standard deviation, and a chosen head counts fully (the conversion of a trained model: no new weights).
    "learned": three linear maps of the token from zero (training from scratch): gates of the routed heads active * p /
    sum of the chosen p, of the shared ones their number times a softmax, and two weights that add up to 2.
    """

    def __init__(self, features: int, heads: int, shared: Sequence[int], active: int, score: Score) -> None:
        super().__init__()
        self.shared, self.score = tuple(shared), score
        self.routed = tuple(h for h in range(heads) if h not in set(shared))
        self.count, self.active = len(self.routed), active
        if score == "learned":
            self.router = Router(features, self.count)
            self.within = Router(features, max(1, len(self.shared)))
            self.between = Router(features, 2)

    def route(self, tokens: Tensor, queries: Tensor) -> Routing:
        """The routed heads of tokens (n, D) with queries (n, heads, width)."""
        if self.score == "learned":
            probabilities = self.router(tokens).softmax(-1)
        else:
            norm = queries[:, list(self.routed)].float().norm(dim=-1)
            probabilities = (norm / norm.std(-1, keepdim=True).clamp_min(1e-12)).softmax(-1)
        order = probabilities.argsort(dim=-1, descending=True, stable=True)  # ties by index
        chosen = order[:, : self.active]
        top = probabilities.gather(1, chosen)
        gates = straight_through(top)
        if self.score == "learned":
            gates = self.active * top / top.sum(-1, keepdim=True).clamp_min(1e-20)
            gates = gates * self.between(tokens).softmax(-1)[:, 1:] * 2
        return self.tell(Routing(probabilities, chosen, gates))

    def shared_gates(self, tokens: Tensor) -> Tensor | None:
        """(n, shared) for tokens (n, D); None where all are one."""
        if self.score == "query" or not self.shared:
            return None
        own = len(self.shared) * self.within(tokens).softmax(-1)
        return own * self.between(tokens).softmax(-1)[:, :1] * 2 if self.count else own

    def extra_repr(self) -> str:
        return f"{len(self.shared)} shared, {self.active} of {self.count} routed, by {self.score}"


class GroupRouter(Routed):
    """Belongs to an attention module: `count` groups of heads, each of which takes the share `active / count` of a
    sample's tokens (at least one). Every group has the same load, so nothing has to be balanced."""

    balanced = False

    def __init__(self, features: int, groups: int, active: int) -> None:
        super().__init__()
        self.count, self.active = groups, active
        self.router = Router(features, groups)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, groups, t) that each group takes of x (n, T, D), in their order, and gates of one."""
        probabilities = self.router(x).softmax(-1)
        taken = share_of(x.shape[1], self.active, self.count)
        chosen = probabilities.transpose(1, 2).topk(taken, dim=-1).indices.sort(dim=-1).values
        self.tell(Routing(probabilities.flatten(0, 1), assignments(chosen, x.shape[1]), torch.ones(0)))
        return chosen, straight_through(probabilities.transpose(1, 2).gather(2, chosen))

    def extra_repr(self) -> str:
        return f"{self.count} groups, each takes {self.active} of {self.count} tokens"


class RoutedAttention:
    """The processor of an attention module with a `HeadRouter` or a `GroupRouter` as its `head_router`."""

    def __init__(self, reference: bool = False) -> None:
        self.reference = reference  # compute everything and mask: what the grouped execution is tested against

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **ignored: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None or encoder_hidden_states is not None:
            what = "routed heads attend to all tokens of their own stream"
            raise DitcompressError("E205", "attention mask", what, "call the model without one")
        router = attn.head_router
        if isinstance(router, GroupRouter):
            return _by_groups(attn, router, hidden_states, self.reference)
        return _by_heads(attn, router, hidden_states, self.reference)


def _split(attn: Any, x: Tensor) -> Tensor:
    """(n, T, heads * width) to (n, heads, T, width)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)  # type: ignore[no-any-return]


def _columns(attn: Any, head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def _by_heads(attn: Any, router: HeadRouter, x: Tensor, reference: bool) -> Tensor:
    """Shared heads for all tokens, each routed head for those that chose it."""
    raw = _split(attn, attn.to_q(x))
    q, k = _normed(attn.norm_q, raw), _normed(attn.norm_k, _split(attn, attn.to_k(x)))
    v = _split(attn, attn.to_v(x))
    n, heads, length, width = q.shape
    tokens = x.flatten(0, 1)
    routing = router.route(tokens, raw.transpose(1, 2).flatten(0, 1))
    out = attn.to_out[0]
    mixed = x.new_zeros(n * length, heads, width)  # outputs of all heads, zero where a token did not choose one
    if router.shared:
        own = list(router.shared)
        gates = router.shared_gates(tokens)
        part = scaled_dot_product_attention(q[:, own], k[:, own], v[:, own], scale=attn.scale)
        part = part.transpose(1, 2).flatten(0, 1)
        mixed = mixed.index_copy(1, _index(own, x), part if gates is None else part * gates[..., None].to(part.dtype))
    every = torch.zeros_like(routing.probabilities).scatter(1, routing.chosen, routing.gates)
    if reference:
        routed = list(router.routed)
        part = scaled_dot_product_attention(q[:, routed], k[:, routed], v[:, routed], scale=attn.scale)
        part = part.transpose(1, 2).flatten(0, 1) * every[..., None].to(x.dtype)
        return _finished(attn, out(mixed.index_copy(1, _index(routed, x), part).flatten(1)), x)
    plain = type(out) is nn.Linear
    used = [h for h in range(heads) if h in set(router.shared)]
    if plain:  # a packed linear takes all columns at once
        flat = mixed[:, used].flatten(1)
        total = linear(flat, out.weight[:, _channels(used, width, x)], out.bias)
    for place, head in enumerate(router.routed):
        rows = _chose(routing, place)
        if not len(rows):
            continue
        part = _attended(q[:, head], k[:, head], v[:, head], rows, length, attn.scale)
        part = part * every[rows, place, None].to(part.dtype)
        if plain:
            total = total.index_add(0, rows, linear(part, out.weight[:, _columns(attn, head, width)]))
        else:
            mixed = mixed.index_put((rows, torch.full_like(rows, head)), part)
    return _finished(attn, total if plain else out(mixed.flatten(1)), x)


def _index(heads: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(heads), device=like.device)


def _channels(heads: Sequence[int], width: int, like: Tensor) -> Tensor:
    return (_index(heads, like)[:, None] * width + torch.arange(width, device=like.device)).flatten().long()


def _chose(routing: Routing, place: int) -> Tensor:
    """Rows of the tokens that chose the routed head `place`."""
    return (routing.chosen == place).any(1).nonzero()[:, 0]


def _attended(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, length: int, scale: float) -> Tensor:
    """Output (len(rows), width) of one head, all (n, T, width), for some tokens; samples are padded to the longest."""
    sample, token = rows // length, rows % length
    counts = torch.bincount(sample, minlength=len(q))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[sample]
    queries = q.new_zeros(len(q), int(counts.max()), q.shape[-1]).index_put((sample, place), q[sample, token])
    found = scaled_dot_product_attention(queries[:, None], k[:, None], v[:, None], scale=scale)[:, 0]
    return found[sample, place]


def _by_groups(attn: Any, router: GroupRouter, x: Tensor, reference: bool) -> Tensor:
    """Every group of heads attends among the tokens that it took; what no group took gets the output's bias alone."""
    n, length, _ = x.shape
    chosen, gates = router.route(x)
    width = attn.to_q.out_features // attn.heads
    each = attn.heads // router.count
    out = attn.to_out[0]
    total = torch.zeros(n, length, attn.to_out[0].out_features, dtype=x.dtype, device=x.device)
    if out.bias is not None:
        total = total + out.bias.to(x.dtype)
    for group in range(router.count):
        own = slice(group * each * width, (group + 1) * each * width)
        rows = chosen[:, group]
        some = x if reference else x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        q, k, v = (_part(layer, own, some).unflatten(-1, (each, width)).transpose(1, 2)
                   for layer in (attn.to_q, attn.to_k, attn.to_v))  # fmt: skip
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        mask = None
        if reference:
            taken = torch.zeros(n, length, dtype=torch.bool, device=x.device).scatter_(1, rows, True)
            mask = taken[:, None, None]
        part = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale).transpose(1, 2).flatten(2)
        y = linear(part, out.weight[:, own].to(part.dtype))
        if reference:
            total = total + y * taken[..., None]
        else:
            weighted = y * gates[:, group, :, None].to(y.dtype)
            total = total.scatter_add(1, rows[..., None].expand(-1, -1, y.shape[-1]), weighted)
    return _finished(attn, total.flatten(0, 1), x)


def _part(layer: nn.Linear, own: slice, x: Tensor) -> Tensor:
    """Some outputs of a linear."""
    bias = None if layer.bias is None else layer.bias[own].to(x.dtype)
    return linear(x, layer.weight[own].to(x.dtype), bias)


def _finished(attn: Any, y: Tensor, like: Tensor) -> Tensor:
    """(n * T, D) after the dropout, as (n, T, D)."""
    return attn.to_out[1](y.reshape(*like.shape[:-1], -1))  # type: ignore[no-any-return]
