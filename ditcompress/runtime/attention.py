"""The processor of an attention whose heads are routed (runtime/heads.py): of one stream or of two that attend jointly.

Of a joint attention (SD3, FLUX, Qwen-Image) each stream is projected by its own linears; keys and values of both are
attended together, in the order text, image, and each stream's outputs go through its own output linear. Where the text
leaves the block unchanged (`context_pre_only`) it has keys and values alone, and no queries are computed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ..errors import DitcompressError
from .heads import GroupRouter, HeadRouter
from .moe import Routing

Angles = tuple[Tensor, Tensor]  # cosines and sines, (T, width) or (n, T, width), each pair of channels alike


@dataclass(frozen=True)
class Stream:
    """Tokens `x` (n, T, D) with the linears and norms that are theirs; `out` is None where only their keys and values
    count. `first`: place of their first token among all, which `angles` and masks count by."""

    x: Tensor
    q: Any
    k: Any
    v: Any
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    out: Any
    dropout: nn.Module | None
    added: bool
    first: int

    def rows(self) -> slice:
        """Its places among the tokens of all streams."""
        return slice(self.first, self.first + self.x.shape[1])


class RoutedAttention:
    """The processor of an attention module with a `HeadRouter` or a `GroupRouter` as its `head_router`. `dense`: the
    processor that computes all heads for all tokens; `reference`: compute everything and mask, what the grouped
    execution is tested against."""

    def __init__(self, dense: Any = None, reference: bool = False) -> None:
        self.dense, self.reference = dense, reference

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None, temb: Tensor | None = None, **ignored: Any,
    ) -> Any:  # fmt: skip
        joint = getattr(attn, "added_kv_proj_dim", None) is not None
        if attention_mask is not None or joint != (encoder_hidden_states is not None):
            what = "routed heads attend to all tokens of the attention's own streams"
            raise DitcompressError("E205", "attention mask", what, "call the model without one")
        streams = _streams(attn, hidden_states, encoder_hidden_states)
        keys = _key_mask(encoder_hidden_states_mask, hidden_states)
        run = _by_groups if isinstance(attn.head_router, GroupRouter) else _by_heads
        found = run(attn, attn.head_router, streams, _angles(image_rotary_emb), keys, self.reference)
        return (found[-1], encoder_hidden_states if streams[0].out is None else found[0]) if joint else found[-1]


def _streams(attn: Any, image: Tensor, text: Tensor | None) -> list[Stream]:
    out, dropout = attn.to_out[0], attn.to_out[1] if len(attn.to_out) > 1 else None
    own = Stream(image, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, out, dropout, False,
                 0 if text is None else text.shape[1])  # fmt: skip
    if text is None:
        return [own]
    last = None if getattr(attn, "context_pre_only", False) else attn.to_add_out
    added = Stream(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, getattr(attn, "norm_added_q", None),
                   getattr(attn, "norm_added_k", None), last, None, True, 0)  # fmt: skip
    return [added, own]


def _key_mask(text: Tensor | None, image: Tensor) -> Tensor | None:
    """Which keys count (n, T), of a mask of the text's tokens."""
    if text is None:
        return None
    ones = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    return torch.cat([text.to(torch.bool), ones], dim=1)


def _angles(rotary: Any) -> Angles | None:
    """FLUX gives cosines and sines (T, width) of both streams, Qwen-Image complex numbers of image and text."""
    if rotary is None:
        return None
    first, second = rotary
    if not first.is_complex():
        return first, second
    both = torch.cat([second, first])
    return both.real.repeat_interleave(2, dim=-1), both.imag.repeat_interleave(2, dim=-1)


def _turned(x: Tensor, angles: Angles | None) -> Tensor:
    """x (n, heads, T, width) with its pairs of channels turned by `angles`."""
    if angles is None:
        return x
    cos, sin = (a[None, None] if a.dim() == 2 else a[:, None] for a in angles)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return (wide * cos + torch.stack([-odd, even], -1).flatten(-2) * sin).to(x.dtype)


def _of_tokens(angles: Angles | None, rows: slice | Tensor) -> Angles | None:
    """The angles of some tokens, a slice or indices (n, t)."""
    return None if angles is None else (angles[0][rows], angles[1][rows])


def _split(attn: Any, x: Tensor) -> Tensor:
    """(n, T, heads * width) to (n, heads, T, width)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)  # type: ignore[no-any-return]


def _finished(stream: Stream, y: Tensor) -> Tensor:
    """(n * T, D) after the dropout, as (n, T, D)."""
    y = y.reshape(*stream.x.shape[:-1], -1)
    return y if stream.dropout is None else stream.dropout(y)  # type: ignore[no-any-return]


# --- tokens choose heads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined:
    """Keys and values (n, heads, T, width) of all streams, and what goes with them."""

    k: Tensor
    v: Tensor
    mask: Tensor | None  # (n, 1, 1, T)
    scale: float | None
    reference: bool

    def attend(self, q: Tensor, heads: Sequence[int]) -> Tensor:
        """Outputs (n * T, heads, width) of some heads for all queries (n, all heads, T, width)."""
        own = list(heads)
        found = scaled_dot_product_attention(
            q[:, own], self.k[:, own], self.v[:, own], attn_mask=self.mask, scale=self.scale
        )
        return found.transpose(1, 2).flatten(0, 1)

    def attend_some(self, q: Tensor, head: int, rows: Tensor) -> Tensor:
        """Output (len(rows), width) of one head for some of the queries (n, T, width); samples are padded to the
        longest."""
        length = q.shape[1]
        sample, token = rows // length, rows % length
        counts = torch.bincount(sample, minlength=len(q))
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[sample]
        queries = q.new_zeros(len(q), int(counts.max()), q.shape[-1]).index_put((sample, place), q[sample, token])
        k, v = self.k[:, head : head + 1], self.v[:, head : head + 1]
        found = scaled_dot_product_attention(queries[:, None], k, v, attn_mask=self.mask, scale=self.scale)[:, 0]
        return found[sample, place]


def _by_heads(
    attn: Any, router: HeadRouter, streams: Sequence[Stream], angles: Angles | None, mask: Tensor | None,
    reference: bool,
) -> list[Tensor]:  # fmt: skip
    """Of every stream that has outputs: shared heads for all tokens, each routed head for those that chose it."""
    k = torch.cat([_normed(s.norm_k, _split(attn, s.k(s.x))) for s in streams], dim=2)
    v = torch.cat([_split(attn, s.v(s.x)) for s in streams], dim=2)
    keys = None if mask is None else mask[:, None, None]
    joined = _Joined(_turned(k, angles), v, keys, getattr(attn, "scale", None), reference)
    found = []
    for stream in streams:
        if stream.out is not None:
            raw = _split(attn, stream.q(stream.x))
            q = _turned(_normed(stream.norm_q, raw), _of_tokens(angles, stream.rows()))
            found.append(_finished(stream, _stream_by_heads(router, stream, raw, q, joined)))
    return found


def _stream_by_heads(router: HeadRouter, stream: Stream, raw: Tensor, q: Tensor, joined: _Joined) -> Tensor:
    """Outputs (n * T, D) of one stream with queries (n, heads, T, width), `raw` before norm and position."""
    heads, width = q.shape[1], q.shape[-1]
    tokens, x, out = stream.x.flatten(0, 1), stream.x, stream.out
    routing = router.route(tokens, raw.transpose(1, 2).flatten(0, 1), stream.added)
    mixed = x.new_zeros(len(tokens), heads, width)  # outputs of all heads, zero where a token did not choose one
    if router.shared:
        gates, part = router.shared_gates(tokens, stream.added), joined.attend(q, router.shared)
        part = part if gates is None else part * gates[..., None].to(part.dtype)
        mixed = mixed.index_copy(1, _index(router.shared, x), part)
    every = torch.zeros_like(routing.probabilities).scatter(1, routing.chosen, routing.gates)
    if joined.reference:
        part = joined.attend(q, router.routed) * every[..., None].to(x.dtype)
        return out(mixed.index_copy(1, _index(router.routed, x), part).flatten(1))  # type: ignore[no-any-return]
    plain = type(out) is nn.Linear
    used = [h for h in range(heads) if h in set(router.shared)]
    if plain:  # a packed linear takes all columns at once
        total = linear(mixed[:, used].flatten(1), out.weight[:, _channels(used, width, x)], out.bias)
    for place, head in enumerate(router.routed):
        rows = _chose(routing, place)
        if not len(rows):
            continue
        part = joined.attend_some(q[:, head], head, rows)
        part = part * every[rows, place, None].to(part.dtype)
        if plain:
            total = total.index_add(0, rows, linear(part, out.weight[:, head * width : (head + 1) * width]))
        else:
            mixed = mixed.index_put((rows, torch.full_like(rows, head)), part)
    return total if plain else out(mixed.flatten(1))  # type: ignore[no-any-return]


def _index(heads: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(heads), device=like.device)


def _channels(heads: Sequence[int], width: int, like: Tensor) -> Tensor:
    return (_index(heads, like)[:, None] * width + torch.arange(width, device=like.device)).flatten().long()


def _chose(routing: Routing, place: int) -> Tensor:
    """Rows of the tokens that chose the routed head `place`."""
    return (routing.chosen == place).any(1).nonzero()[:, 0]


# --- heads choose tokens ---------------------------------------------------------------------------------------------


def _by_groups(
    attn: Any, router: GroupRouter, streams: Sequence[Stream], angles: Angles | None, mask: Tensor | None,
    reference: bool,
) -> list[Tensor]:  # fmt: skip
    """Every group of heads attends among the tokens that it took of each stream; what no group took gets the output's
    bias alone. Of a stream without outputs every group takes all keys and values."""
    routed = {s.first: router.route(s.x, s.added) for s in streams if s.out is not None}
    totals = {s.first: _started(s) for s in streams if s.out is not None}
    for group in range(router.count):
        taken = []
        for s in streams:
            every = torch.arange(s.x.shape[1], device=s.x.device).expand(len(s.x), -1)
            taken.append(routed[s.first][0][:, group] if s.first in routed else every)
        parts = _group(attn, group, router.count, streams, taken, angles, mask, reference)
        for s, rows, part in zip(streams, taken, parts, strict=True):
            if part is not None:
                gates = routed[s.first][1][:, group, :, None].to(part.dtype)
                index = rows[..., None].expand(-1, -1, part.shape[-1])
                part = part.gather(1, index) if reference else part
                totals[s.first] = totals[s.first].scatter_add(1, index, part * gates)
    return [_finished(s, totals[s.first].flatten(0, 1)) for s in streams if s.out is not None]


def _started(stream: Stream) -> Tensor:
    """The output's bias for all tokens, (n, T, D)."""
    x, out = stream.x, stream.out
    total = torch.zeros(*x.shape[:2], out.out_features, dtype=x.dtype, device=x.device)
    return total if out.bias is None else total + out.bias.to(x.dtype)


def _group(
    attn: Any, group: int, groups: int, streams: Sequence[Stream], taken: Sequence[Tensor], angles: Angles | None,
    mask: Tensor | None, reference: bool,
) -> list[Tensor | None]:  # fmt: skip
    """What one group of heads adds to the tokens that it took (n, t) of each stream, (n, t, D); None for a stream
    without outputs. With `reference` for all tokens, which attend to those that were taken."""
    each = attn.heads // groups
    width = streams[-1].q.out_features // attn.heads
    own = slice(group * each * width, (group + 1) * each * width)
    queries, keys, values, counts = [], [], [], []
    for s, rows in zip(streams, taken, strict=True):
        x = s.x if reference else s.x.gather(1, rows[..., None].expand(-1, -1, s.x.shape[-1]))
        there = _of_tokens(angles, s.rows() if reference else s.first + rows)
        if s.out is not None:
            queries.append(_turned(_normed(s.norm_q, _heads_of(s.q, own, x, each)), there))
            counts.append(x.shape[1])
        keys.append(_turned(_normed(s.norm_k, _heads_of(s.k, own, x, each)), there))
        values.append(_heads_of(s.v, own, x, each))
    allowed = _allowed(streams, taken, mask, reference)
    found = scaled_dot_product_attention(
        torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2), attn_mask=allowed,
        scale=getattr(attn, "scale", None),
    )  # fmt: skip
    parts = iter(found.transpose(1, 2).flatten(2).split(counts, dim=1))
    return [None if s.out is None else _columns(s.out, own, next(parts)) for s in streams]


def _heads_of(layer: Any, own: slice, x: Tensor, each: int) -> Tensor:
    """Some outputs of a linear as heads, (n, each, t, width)."""
    bias = None if layer.bias is None else layer.bias[own].to(x.dtype)
    return linear(x, layer.weight[own].to(x.dtype), bias).unflatten(-1, (each, -1)).transpose(1, 2)


def _columns(out: Any, own: slice, y: Tensor) -> Tensor:
    return linear(y, out.weight[:, own].to(y.dtype))


def _allowed(
    streams: Sequence[Stream], taken: Sequence[Tensor], mask: Tensor | None, reference: bool
) -> Tensor | None:  # fmt: skip
    """Which keys count, (n, 1, 1, keys)."""
    places = torch.cat([s.first + rows for s, rows in zip(streams, taken, strict=True)], dim=1)
    if not reference:
        return None if mask is None else mask.gather(1, places)[:, None, None]
    length = sum(s.x.shape[1] for s in streams)
    found = torch.zeros(len(places), length, dtype=torch.bool, device=places.device).scatter_(1, places, True)
    return (found if mask is None else found & mask)[:, None, None]
