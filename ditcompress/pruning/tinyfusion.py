"""TinyFusion (Fang et al. 2024, arXiv 2412.01199, section 3): which blocks to keep is learned, beside what they could
become.

Blocks are split in order into groups of M; a group keeps N of them. All C(M, N) patterns of a group share a categorical
distribution that is learned with straight-through Gumbel-softmax (one draw for every sample; logits times 100, the
temperature falls from 4 to 0.1), together with low-rank adapters on every linear of the blocks: so the set is chosen
whose loss is lowest *after* a cheap update, not right after pruning. The likeliest patterns of the averaged gates
decide; the adapters are thrown away. Recover with `ditcompress distill --loss output=0.9,masked=0.1`: right after
pruning such a set is often worse than oracle-greedy's. With `keep` (ours) the adapters are merged into the blocks that
stay: what the search paid for is not lost, and they may learn ten times as fast.

The paper minimises the training loss on real data, which `loss: output` stands for; `loss: clean` (ours) chooses better
where images count: half of the embedded model so chosen has half the Fréchet distance before recovery. The target is
the whole model's prediction, on states of its own trajectories: no data are needed. Other departures: M counts blocks
that may go, blocks of other lists or sizes are groups of their own, each group's N follows from the ratio, and one that
does not divide evenly gives N that differ. prune.json lists the groups with the probability of the pattern that was
taken (`confidence`); the score of a block is the probability that it stays. A confidence far below 1 asks for more
updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..calibration.trajectory import generator
from ..distill.data import EVERY, Batch, Data
from ..distill.lora import Adapters
from ..distill.losses import output_loss
from ..distill.noising import Noising
from ..distill.trainer import Plain, train
from ..offload import device_of
from ._learned import Gates, LearnedParams, gated, kept_bytes, settings, states
from .base import Context, Scores

NEEDS = ("probes", "training")

START = 0.02  # of every gate
ALPHA = 16.0
Size = Annotated[int, Field(ge=1, le=14)]  # C(14, 7) is 3432 patterns


class Params(LearnedParams):
    """`group`: M, or the sizes in forward order, of which the last repeats; `rank` of the adapters (0: only the gates
    learn); `loss`: "output" of the model, or "clean", which weights its error by what it changes in the implied clean
    latents, and so the noisiest steps most; `keep`: the adapters are merged into the blocks that stay; `gate_rate`: the
    gates' learning rate; `scale` of the logits; `hot` and `cold`: the temperature at both ends."""

    group: Size | list[Size] = 4
    rank: int = Field(8, ge=0)
    loss: Literal["output", "clean"] = "output"
    keep: bool = False
    gate_rate: float = Field(1e-3, gt=0)
    scale: float = Field(100.0, gt=0)
    hot: float = Field(4.0, gt=0)
    cold: float = Field(0.1, gt=0)
    ema: float = Field(0.999, ge=0, lt=1)


@dataclass(frozen=True)
class Group:
    """`units` of which `keep` stay; `patterns` (C, M): every way to do so, 1 = stays."""

    units: tuple[str, ...]
    keep: int

    @property
    def patterns(self) -> Tensor:
        count = len(self.units)
        rows = [[float(i in kept) for i in range(count)] for kept in combinations(range(count), self.keep)]
        return torch.tensor(rows)


def groups_of(context: Context, sizes: int | Sequence[int]) -> list[Group]:
    """Groups that together save the target, as nearly as whole units allow; in forward order.

    Units of one group lie in the same lists and have as many parameters, so that any pattern saves the same.
    """
    sizes = [sizes] if isinstance(sizes, int) else list(sizes) or [1]
    alike: dict[Any, list[str]] = {}
    for name in context.names:
        blocks = context.blocks(name)
        weights = sum(p.numel() for block in blocks for p in context.model.get_submodule(block).parameters())
        alike.setdefault((tuple(sorted({b.rpartition(".")[0] for b in blocks})), weights), []).append(name)
    found: list[list[str]] = []
    for names in alike.values():
        place = 0
        while names:
            size = sizes[min(place, len(sizes) - 1)]
            found.append(names[:size])
            names, place = names[size:], place + 1
    order = {name: number for number, name in enumerate(context.names)}
    found.sort(key=lambda names: order[names[0]])
    return [Group(tuple(names), len(names) - less) for names, less in zip(found, _shares(context, found), strict=True)]


def _shares(context: Context, groups: Sequence[Sequence[str]]) -> list[int]:
    """How many units each group gives up: one at a time where the smallest share would be gone, until enough is."""
    less = [0] * len(groups)
    removed: list[str] = []
    while allowed := context.fitting(removed):
        fits = [n for n, names in enumerate(groups) if less[n] < len(names) and names[less[n]] in allowed]
        if not fits:
            break
        best = min(fits, key=lambda number: (less[number] + 1) / len(groups[number]))
        removed.append(groups[best][less[best]])
        less[best] += 1
    return less


class Search(Plain):
    """The training task: gates of every group and adapters, against the whole model on the same states."""

    def __init__(
        self, context: Context, params: Params, groups: Sequence[Group], data: Data, gates: Gates,
        adapters: Adapters | None, weights: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """`weights` of errors (n,) by timestep (n,)."""
        self.context, self.params, self.groups, self.data = context, params, groups, data
        self.gates, self.adapters = gates, adapters
        device = next(context.model.parameters()).device
        self.patterns = [group.patterns.to(device) for group in groups]
        self.weights = weights
        self.logits = [torch.full((len(p),), START, device=device, requires_grad=True) for p in self.patterns]

    def parameters(self) -> dict[str, Tensor]:
        found = {f"gate.{number}": gate for number, gate in enumerate(self.logits)}
        return found | (self.adapters.parameters() if self.adapters else {})

    def rates(self) -> dict[str, float]:
        return {f"gate.{number}": self.params.gate_rate for number in range(len(self.logits))}

    def loss(self, step: int, part: int) -> Tensor:
        batch = self.data.batch(step, self.params.rows, part)
        given = (self.context.model, batch.latents, batch.timestep, batch.cond)
        with torch.no_grad():
            wanted = self.data.adapter.predict(*given).float()
        try:
            if self.adapters:
                self.adapters.enabled = True
            with self.gates.at(self.draw(step, part, len(batch.latents))):
                found = self.data.adapter.predict(*given).float()
        finally:
            if self.adapters:
                self.adapters.enabled = False  # the model samples the next states and teaches
        return output_loss(found, wanted, self.weights(batch.timestep).to(wanted.device) if self.weights else None)

    def draw(self, step: int, part: int, count: int) -> dict[str, Tensor]:
        """One pattern of every group for each of `count` samples, by unit (count,): 1 or 0, with a soft gradient."""
        share = step / max(self.params.updates - 1, 1)
        heat = self.params.hot + (self.params.cold - self.params.hot) * share
        noise = generator(self.context.seed, step, 4_000_000 + part)
        found: dict[str, Tensor] = {}
        for group, patterns, logits in zip(self.groups, self.patterns, self.logits, strict=True):
            uniform = torch.rand(count, len(logits), generator=noise).clamp(1e-12, 1 - 1e-7).to(logits.device)
            soft = ((self.params.scale * logits - (-uniform.log()).log()) / heat).softmax(1)
            hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
            # one-hot values to the last bit, so that a mask of 1 leaves the block's output as it is
            masks = (hard + (soft - soft.detach())) @ patterns
            found |= dict(zip(group.units, masks.unbind(1), strict=True))
        return found

    @torch.no_grad()
    def found(self) -> list[dict[str, Any]]:
        """Each group: its units, those of the likeliest pattern, and how likely that is."""
        rows = []
        for group, patterns, logits in zip(self.groups, self.patterns, self.logits, strict=True):
            likely = (self.params.scale * logits).softmax(0)
            kept = patterns[int(likely.argmax())].tolist()
            stays = (likely @ patterns).tolist()
            rows.append({
                "units": list(group.units),
                "kept": [unit for unit, stay in zip(group.units, kept, strict=True) if stay],
                "confidence": float(likely.max()),
                "stays": dict(zip(group.units, stays, strict=True)),
            })  # fmt: skip
        return rows


def scores(context: Context, params: Params) -> Scores:
    """The learned probability that each unit stays, and the groups."""
    groups, data = groups_of(context, params.group), states(context, params)
    weights = None
    if params.loss == "clean":
        weights = Noising(data.scheduler, data.adapter, data.config, "use loss=output").clean_weights
    with learning(context, params) as (gates, adapters):
        task = Search(context, params, groups, data, gates, adapters, weights)
        options = settings(params, schedule="constant", warmup=0.0, ema=params.ema, clip=1.0)
        if any(len(patterns) > 1 for patterns in task.patterns):
            train(task, options, journal=context.journal, reporter=context.reporter)
        found = task.found()
        tensors = merged(context, adapters) if params.keep and adapters else {}
    values = {unit: stay for row in found for unit, stay in row.pop("stays").items()}
    return Scores({name: values[name] for name in context.names}, notes={"groups": found}, tensors=tensors)


@contextmanager
def learning(context: Context, params: Params) -> Iterator[tuple[Gates, Adapters | None]]:
    """The model with a gate at every unit and adapters, not enabled yet, at the linears of the blocks."""
    with context.still(), gated(context) as gates, ExitStack() as stack:
        adapters = None
        if params.rank:
            adapters = Adapters(context.model, context.layout.blocks, params.rank, context.seed, ALPHA / params.rank)
            stack.callback(adapters.remove)
            adapters.enabled = False
        yield gates, adapters


def state_bytes(context: Context, params: Params) -> int:
    """What one state of a training step keeps for the backward pass."""
    with learning(context, params) as (gates, adapters):
        task = Search(context, params, groups_of(context, params.group), _Probed(context), gates, adapters)
        own = (*context.model.parameters(), *task.parameters().values())
        return kept_bytes(lambda: task.loss(0, 0), own)


class _Probed:
    """A batch of one state: the first one that was probed."""

    def __init__(self, context: Context) -> None:
        self.adapter, self.device = context.adapter, device_of(context.model)
        self.probe = context.probes[0].rows(slice(0, 1))

    def batch(self, step: int, size: int, part: int = 0, rows: slice = EVERY) -> Batch:
        return Batch(self.probe.latents.to(self.device), self.probe.timestep.to(self.device), self.probe.cond)


@torch.no_grad()
def merged(context: Context, adapters: Adapters) -> dict[str, Tensor]:
    """The weights (out, in) of all blocks with what their adapters learned."""
    found = {}
    for name, change in adapters.changes().items():
        weight = context.model.get_submodule(name).get_parameter("weight")
        found[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return found


def select(context: Context, params: Params, scores: Scores) -> list[str]:
    """Units outside their group's pattern, the least wanted first; where measured costs of equal blocks differ, more
    of the least wanted until enough is saved."""
    groups: Sequence[Mapping[str, Any]] = scores.notes["groups"]
    kept = {unit for row in groups for unit in row["kept"]}
    removed = sorted((name for name in context.names if name not in kept), key=lambda name: scores.values[name])
    while not context.enough(removed) and (left := list(context.removable(removed))):
        removed.append(min(left, key=lambda name: scores.values[name]))
    return removed
