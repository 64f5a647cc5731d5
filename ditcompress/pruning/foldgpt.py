"""FoldGPT (Liu et al. 2024, arXiv 2407.00928): learnable gates rank the blocks; those that stay may share weights.

Every unit gets a gate a, and its blocks add g (output - input) with g = a^2 / (a^2 + e). As e falls, gates move to 0 or
1. Only the gates learn: the error of the whole model's prediction is made small together with |what is saved - target|.
All gates see each other, so unlike single removals the ranking knows of blocks that do the same work.

With `share` s > 1, s neighbours of those that stay use the attention and feed-forward linears of the first of them, and
each keeps its own norms and modulation. That divides the memory of these linears by s, not the time; config.json says
which module stands in which places (`shared`), so the result needs `import ditcompress` to load, and each tensor is
stored once. The cure then trains the shared linears and all vectors against the whole model's prediction; without it
(`cure: false`) sharing destroys a model. A model with shared weights can be quantized and distilled, not pruned again.

The paper trains on text and has no official code; here the states are those of the model's own trajectories, and the
cure looks at the prediction, not at the outputs of the last layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.data import Data
from ..distill.losses import output_loss
from ..distill.trainer import Plain, train
from ..models import renamed, renumbered
from ..models._depth import settings as shape_of
from ..sharing import apply_shared
from ..structure import remove_blocks
from ._learned import Gates, LearnedParams, casting, gated, journal, settings, states
from .base import Context, Scores

NEEDS = ("probes", "training")
ROLES = ("qkv", "attn_out", "ffn_in", "ffn_out")


class Params(LearnedParams):
    """`soft` and `hard`: e at both ends of the run; `pressure`: weight of the distance to the target, as a share of
    the cost of all units; `share`: blocks that use the same weights (1: none); `cure`: whether these learn, at
    `cure_rate`."""

    learning_rate: float = Field(1e-2, gt=0)
    soft: float = Field(0.1, gt=0)
    hard: float = Field(1e-3, gt=0)
    pressure: float = Field(1.0, gt=0)
    share: int = Field(1, ge=1)
    cure: bool = True
    cure_rate: float = Field(1e-3, gt=0)


class Folding(Plain):
    """The training task: one number for each unit."""

    def __init__(self, context: Context, params: Params, data: Data, gates: Gates) -> None:
        self.context, self.params, self.data, self.gates = context, params, data, gates
        device = next(context.model.parameters()).device
        self.values = torch.ones(len(context.names), device=device, requires_grad=True)
        self.costs = torch.tensor([context.costs[name] for name in context.names], device=device)

    def parameters(self) -> dict[str, Tensor]:
        return {"gates": self.values}

    def open(self, step: int) -> Tensor:
        """How far each unit's gate is open, 0 to 1."""
        share = step / max(self.params.updates - 1, 1)
        edge = self.params.soft * (self.params.hard / self.params.soft) ** share
        return self.values.square() / (self.values.square() + edge)

    def loss(self, step: int, part: int) -> Tensor:
        batch = self.data.batch(step, self.params.rows, part)
        given = (self.context.model, batch.latents, batch.timestep, batch.cond)
        with torch.no_grad():
            wanted = self.data.adapter.predict(*given).float()
        opened = self.open(step)
        with self.gates.at(dict(zip(self.context.names, opened.unbind(), strict=True))):
            found = self.data.adapter.predict(*given).float()
        away = ((1 - opened) * self.costs).sum() - self.context.target
        return output_loss(found, wanted) + self.params.pressure * away.abs() / self.costs.sum()


def scores(context: Context, params: Params) -> Scores:
    """The final gates."""
    data = states(context, params)
    with context.still(), gated(context) as gates:
        task = Folding(context, params, data, gates)
        train(task, settings(params), journal=journal(context, "gates"), reporter=context.reporter)
        opened = task.open(params.updates - 1).detach().tolist()
    return Scores(dict(zip(context.names, opened, strict=True)))


def share(context: Context, params: Params, units: Sequence[str]) -> dict[str, str]:
    """The linears of attention and feed-forward of every block but the first of its group, by those of the first."""
    by_block: dict[str, list[str]] = {}
    for site in context.layout.sites:
        if site.role in ROLES:
            by_block.setdefault(site.block, []).append(site.name)
    found = {}
    for group in groups_of(context, params.share, units):
        for block in group[1:]:
            for name in by_block.get(block, []):
                found[name] = group[0] + name[len(block) :]
    return found


def groups_of(context: Context, size: int, units: Sequence[str]) -> list[list[str]]:
    """The blocks that stay, in groups of at most `size` neighbours of one list and one shape."""
    gone, found = set(context.depth.of(units)), list[list[str]]()
    kinds: list[object] = []
    for block in context.layout.blocks:
        if block in gone:
            continue
        kind = (block.rpartition(".")[0], shape_of(context.model.get_submodule(block)))
        if not found or kinds[-1] != kind or len(found[-1]) == size:
            found.append([])
            kinds.append(kind)
        found[-1].append(block)
    return found


class Cure(Plain):
    """The training task: the shared linears and all vectors in the blocks of `student`, against the whole model."""

    def __init__(
        self, context: Context, params: Params, student: nn.Module, owners: Sequence[str], blocks: Sequence[str],
        data: Data,
    ) -> None:  # fmt: skip
        self.context, self.params, self.data, self.student = context, params, data, student.requires_grad_(False)
        inside, shared = tuple(f"{b}." for b in blocks), tuple(f"{name}." for name in owners)
        self.own = {
            name: tensor.requires_grad_(True)
            for name, tensor in student.named_parameters()  # a tied one once, under its first name: the owner's
            if name.startswith(shared) or (tensor.ndim < 2 and name.startswith(inside))
        }

    def parameters(self) -> Mapping[str, Tensor]:
        return self.own

    def loss(self, step: int, part: int) -> Tensor:
        batch = self.data.batch(step, self.params.rows, part)
        given = (batch.latents, batch.timestep, batch.cond)
        with torch.no_grad():
            wanted = self.data.adapter.predict(self.context.model, *given).float()
        with casting(self.context.model):
            found = self.data.adapter.predict(self.student, *given)
        return output_loss(found.float(), wanted)


def rewrite(context: Context, params: Params, units: Sequence[str]) -> dict[str, Tensor]:
    """The cured tensors, by their names in the whole model; nothing where no weights are shared."""
    copies = share(context, params, units)
    if params.share > 1 and not copies:
        context.reporter.note("no weights are shared: of the blocks that stay no neighbours have one shape")
    if not copies or not params.cure:
        return {}
    removed = context.depth.of(units)
    new = renumbered(context.depth, removed)
    student = remove_blocks(context.model, context.depth, removed).float()
    apply_shared(student, {renamed(copy, new): renamed(owner, new) for copy, owner in copies.items()})
    owners = [renamed(owner, new) for owner in dict.fromkeys(copies.values())]
    task = Cure(context, params, student, owners, list(new.values()), states(context, params))
    slower = params.model_copy(update={"learning_rate": params.cure_rate})
    with context.still():
        train(task, settings(slower), journal=journal(context, "cure"), reporter=context.reporter)
    old = {place: block for block, place in new.items()}
    return {renamed(name, old): tensor.detach() for name, tensor in task.own.items()}
