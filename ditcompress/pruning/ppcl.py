"""PPCL (2025, arXiv 2511.16156, section 3): contiguous blocks that linear maps can stand in for become one block.

Every block gets a residual linear probe. From a block u on, the following ones are replaced by their probes, one after
the other, while the similarity (CKA) to the model falls by less and less; where the fall grows again the interval
[u, v] ends. Only u stays of an interval, and learns to give, from the model's own input of u, the model's output of v:
token directions by the paper's loss, 2 (1 - cosine), and their lengths by `norm` (0: the paper's; they may drift).
Inputs and targets are the whole model's, so intervals learn independently and no error builds up while they do.

What the paper leaves open: intervals are taken by least loss of similarity a block until the ratio is met, the last one
in part; if they do not suffice, the block goes whose removal adds the least loss. The first fall is compared with that
of u's own probe, so a block whose follower is the worse of the two stays alone. The first block of every list stays.
The paper starts from the middle block of an interval in its code and from u in its text; here it is u. Intervals can
get their own blocks back later (`ditcompress plug`). Linear feed-forwards, of the paper's second stage, are
`--width-method linear-ffn`; its linear text streams are not here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.data import Data
from ..distill.losses import direction_features
from ..distill.trainer import Plain, train
from ..models import Depth
from ._cka import Chains, record, runs
from ._learned import LearnedParams, casting, settings, states, used_outside
from .base import Context, Scores

NEEDS = ("probes", "training")


class Params(LearnedParams):
    """`tokens` of every stream that similarity is measured on; `ridge` of the probes; `longest` interval in blocks;
    `slack`: a fall of similarity counts as greater from here on; `norm`: weight of the tokens' lengths in the loss;
    `train`: whether the kept blocks learn at all."""

    learning_rate: float = Field(3e-4, gt=0)
    tokens: int = Field(2048, ge=16)
    ridge: float = Field(1e-4, gt=0)
    longest: int = Field(12, ge=2)
    slack: float = Field(1e-4, ge=0)
    norm: float = Field(1.0, ge=0)
    train: bool = True


def scores(context: Context, params: Params) -> Scores:
    """Loss of similarity when a unit alone becomes linear; in the notes the intervals, and the units that they and the
    search for what is left give up, in order."""
    chains = Chains(record(context, params.tokens), params.ridge)
    found = [
        {"list": owner, "first": u, "last": v, "loss": 1 - chains.similarity(owner, u + 1, v)}
        for owner, count in context.depth.lists.items()
        for u, v in intervals(chains, owner, count, params)
    ]
    first = frozenset(n for n in context.names if any(b.rpartition(".")[2] == "0" for b in context.blocks(n)))
    values = {name: loss_of(chains, context.blocks(name)) for name in context.names}
    notes = {"intervals": found, "absorbed": _absorbed(context, chains, found, first)}
    return Scores(values, keep=first, notes=notes)


def select(context: Context, params: Params, scores: Scores) -> list[str]:
    """The units that the notes name."""
    return list(scores.notes["absorbed"])


def loss_of(chains: Chains, blocks: Sequence[str]) -> float:
    """1 - similarity, summed over the runs of `blocks`."""
    return sum(1 - chains.similarity(*run) for run in runs(blocks))


def intervals(chains: Chains, owner: str, count: int, params: Params) -> Iterator[tuple[int, int]]:
    """[u, v] of one list of `count` blocks: u stays, u + 1 to v can become it."""
    u = 0
    while u < count - 1:
        v = u
        fall = 1 - chains.similarity(owner, u, u) if chains.has(owner, u) else float("inf")
        for k in range(u + 1, min(count, u + params.longest)):
            if not chains.has(owner, k):
                break
            next_fall = chains.similarity(owner, u + 1, k - 1) - chains.similarity(owner, u + 1, k)
            if next_fall > fall + params.slack:
                break
            v, fall = k, next_fall
        if v > u:
            yield u, v
        u = v + 1


def _absorbed(
    context: Context, chains: Chains, found: Sequence[Mapping[str, Any]], keep: frozenset[str]
) -> list[str]:  # fmt: skip
    """Units in the order in which they go: interval by interval, then whichever adds the least loss for its cost."""
    inside = {
        f"{row['list']}.{number}": row["loss"] / (row["last"] - row["first"])
        for row in found
        for number in range(row["first"] + 1, row["last"] + 1)
    }
    ranked = {
        n: max(inside[b] for b in context.blocks(n)) for n in context.names if inside.keys() >= {*context.blocks(n)}
    }
    removed: list[str] = []
    while allowed := context.fitting(removed, keep):
        within = [name for name in allowed if name in ranked] or allowed
        now = context.depth.of(removed)
        before = loss_of(chains, now)
        added = {n: (loss_of(chains, (*now, *context.blocks(n))) - before) / context.costs[n] for n in within}
        removed.append(min(within, key=lambda name: (ranked.get(name, 0.0), added[name])))
    return removed


@dataclass(frozen=True)
class Interval:
    """`students`, the trained blocks, and the blocks that went for which they stand. One of each list, unless blocks
    of several lists, or of both ends of one, can only go together."""

    students: tuple[str, ...]
    gone: tuple[str, ...]


def taken(depth: Depth, removed: Sequence[str]) -> list[Interval]:
    """What was made of the blocks `removed`: intervals that can be switched one by one, in forward order."""
    groups: list[set[str]] = [{f"{o}.{n}" for n in range(first, last + 1)} for o, first, last in runs(removed)]
    for unit in depth.units:
        joined = [group for group in groups if group & {*unit.blocks}]
        if len(joined) > 1:
            groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    order = {
        f"{owner}.{n}": (place, n) for place, (owner, count) in enumerate(depth.lists.items()) for n in range(count)
    }
    found = []
    for group in sorted(groups, key=lambda group: min(order[block] for block in group)):
        students = [f"{owner}.{first - 1}" for owner, first, _ in runs(list(group))]
        found.append(Interval(tuple(students), tuple(sorted(group, key=order.__getitem__))))
    return found


class Students(Plain):
    """The training task: a copy of the kept block of every interval (list, u, v), fed and taught by the whole model."""

    def __init__(
        self, context: Context, params: Params, spans: Sequence[tuple[str, int, int]], data: Data, fixed: set[str]
    ) -> None:
        self.context, self.params, self.data = context, params, data
        self.pairs = [(f"{owner}.{u}", f"{owner}.{v}") for owner, u, v in spans]
        self.blocks: dict[str, nn.Module] = {}
        for u, _ in self.pairs:
            self.blocks[u] = copy.deepcopy(context.model.get_submodule(u)).float().requires_grad_(False)
        self.own: dict[str, Tensor] = {}
        for u, block in self.blocks.items():
            for name, tensor in block.named_parameters():
                outside = any(f"{u}.{name}".startswith(f"{part}.") for part in fixed)
                if tensor.is_floating_point() and not outside:
                    self.own[f"{u}.{name}"] = tensor.requires_grad_(True)
        self.calls: dict[str, tuple[Any, Any, Any]] = {}
        self.handles = [
            context.model.get_submodule(block).register_forward_hook(self._keep(block), with_kwargs=True)
            for block in dict.fromkeys(block for pair in self.pairs for block in pair)
        ]

    def _keep(self, name: str) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.calls[name] = (args, kwargs, output)

        return hook

    def parameters(self) -> dict[str, Tensor]:
        return self.own

    def terms(self, step: int, part: int) -> list[Tensor]:
        """The loss of each interval."""
        batch = self.data.batch(step, self.params.rows, part)
        with torch.no_grad():
            self.data.adapter.predict(self.context.model, batch.latents, batch.timestep, batch.cond)
        found = []
        for u, v in self.pairs:
            args, kwargs, _ = self.calls[u]
            with casting(self.context.model):
                student = _tensors(self.blocks[u](*args, **kwargs))
            teacher = _tensors(self.calls[v][2])
            found.append(direction_features(student, teacher))
            if self.params.norm:
                found[-1] = found[-1] + self.params.norm * length_loss(student, teacher)
        self.calls.clear()
        return found

    def loss(self, step: int, part: int) -> Tensor:
        return torch.stack(self.terms(step, part)).sum()

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    """The streams of a block's output, float32."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return [part.float() for part in parts if isinstance(part, Tensor)]


def length_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over tokens and streams of the squared relative error of their lengths."""
    parts = [
        ((s.norm(dim=-1) - t.norm(dim=-1)) / t.norm(dim=-1).clamp_min(1e-12)).square().mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).mean()


def rewrite(context: Context, params: Params, units: Sequence[str]) -> dict[str, Tensor]:
    """The trained tensors of the block before every run of removed ones."""
    spans = [(owner, first - 1, last) for owner, first, last in runs(context.depth.of(units))]
    if not spans or not params.train:
        return {}
    fixed = used_outside(context, [f"{owner}.{u}" for owner, u, _ in spans])
    with context.still():
        task = Students(context, params, spans, states(context, params), fixed)
        try:
            train(task, settings(params), journal=context.journal, reporter=context.reporter)
        finally:
            task.release()
    return {name: tensor.detach() for name, tensor in task.parameters().items()}
