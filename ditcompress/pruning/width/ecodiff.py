"""EcoDiff: gates on heads and neurons, learned through the whole sampler (arXiv 2412.02852, without its retraining).

One hard-concrete gate a unit, shared by all steps and both guidance branches, with fresh noise at every forward pass;
the loss is the squared error of the sampler's last latents to those of the original from the same noise, plus a
regulariser that pulls all gates down; what is left of the logits after some tens of updates ranks the units. Unlike the
published code, logits are float32 and the noise of a step is the same in the repeated pass, so gradients are those of
the forward pass (ours). Gates on modulation outputs (`modulation`) end as rows of zeros: they stay in the file, for
every element of a modulation belongs to the residual stream, which is not narrowed. Ours, `refit`: a least-squares fit
of the linears behind the gates, as in obs_diff, which makes up for most of what went.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...calibration.trajectory import Sampling, Walk, generator, sample
from ...distill.settings import Settings
from ...distill.trainer import Plain, train
from ...models.base import Axis, Layout
from . import obs_diff
from ._axes import count_of
from ._masks import BETA, HIGH, LOW, Gates, gate, through_sampler
from ._refit import RefitParams
from .base import Context, places

NEEDS = ("probes", "sampler")
OPEN = BETA * math.log(-LOW / HIGH)  # a gate is open with probability sigmoid(logit - OPEN)
BUDGET_WIDTH = 0.05  # excess of open gates at which the regulariser has its full weight
REG_SCALE, REG_SHIFT = 0.4, 1.0  # of the sigmoid in the regulariser


class Params(RefitParams):
    """`updates` of `accumulate` batches of `images_each` out of `prompts` images, each through `sample_steps` steps;
    `rate_heads`, `rate_neurons`, `rate_modulation` and `warmup` updates of AdamW; `init` logits; `eps` bounds the
    noise; `beta` weighs the regulariser, `norm` its kind: 0 (expected number), 1 or 2, of sigmoid(0.4 logit + 1) with
    `reg_sigmoid`; with `budget` it fades, and turns round, as the share of open gates reaches what will stay.
    `modulation`: share of modulation outputs silenced. `refit`: fit the readers afterwards."""

    updates: int = Field(100, ge=1)
    accumulate: int = Field(1, ge=1)
    images_each: int = Field(8, ge=1)
    prompts: int = Field(64, ge=1)
    sample_steps: int = Field(10, ge=1, le=1000)
    rate_heads: float = Field(0.5, gt=0)
    rate_neurons: float = Field(0.3, gt=0)
    rate_modulation: float = Field(0.5, gt=0)
    warmup: int = Field(10, ge=0)
    init: float = 3.0
    eps: float = Field(0.1, gt=0)
    beta: float = Field(0.1, ge=0)
    norm: Literal[0, 1, 2] = 1
    reg_sigmoid: bool = True
    budget: bool = True
    modulation: float = Field(0.0, ge=0, lt=1)
    refit: bool = True


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """The learned logits, (units,)."""
    task = Gating(context, axes, params)
    settings = Settings(
        steps=params.updates, batch=params.images_each, accumulate=params.accumulate, learning_rate=params.rate_neurons,
        weight_decay=0.01, schedule="constant", warmup=min(1.0, params.warmup / params.updates), clip=1e6, save_every=5,
    )  # fmt: skip
    with context.still():
        history = train(task, settings, journal=context.journal, reporter=context.reporter)
    context.reporter.note(f"learned the gates: loss {history.losses[0]:.3g} -> {history.losses[-1]:.3g}")
    context.cache["logits"] = task.logits
    return {axis.name: task.logits[axis.name].detach().double().cpu() for axis in axes}


def rewrite(
    context: Context, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]], params: Params
) -> dict[str, Tensor]:
    """Rows of zeros for silenced modulation outputs, and the readers fitted anew."""
    tensors: dict[str, Tensor] = {}
    for group in modulations(context.layout) if params.modulation else ():
        logit = context.cache["logits"][group.name].detach().cpu()
        gone = torch.argsort(logit, stable=True)[: round(params.modulation * group.count)]
        for name in (f"{group.name}.weight", f"{group.name}.bias"):
            if name in context.model.state_dict():
                tensors[name] = context.read(name).index_fill(0, gone, 0.0)
    if not params.refit:
        return tensors
    return tensors | obs_diff.compensated(context, axes, kept, "output", params)


def modulations(layout: Layout) -> list[Gates]:
    """Gates on every output of the blocks' modulation linears."""
    sites = [site for site in layout.sites if site.role == "modulation" and site.block]
    return [Gates(s.name, s.out_features, 1, ((s.name, 0, s.out_features),), True) for s in sites]


class Gating(Plain):
    """The task of the trainer: logits of all gates."""

    def __init__(self, context: Context, axes: Sequence[Axis], params: Params) -> None:
        self.context, self.params = context, params
        self.groups = [Gates(a.name, count_of(a), a.unit_size, tuple(places(context.layout, a))) for a in axes]
        self.groups += modulations(context.layout) if params.modulation else []
        device = next(context.model.parameters()).device
        self.logits = {
            group.name: torch.full((group.count,), params.init, device=device, requires_grad=True)
            for group in self.groups
        }
        heads = {axis.name for axis in axes if axis.unit == "head"}
        self.own = {g.name: params.rate_modulation if g.outputs else params.rate_heads
                    for g in self.groups if g.outputs or g.name in heads}  # fmt: skip
        assert context.conditions is not None
        self.conditions = context.conditions(params.prompts)
        self.sampling = Sampling(params.sample_steps, context.guidance, context.seed + 15485863, batch=16)
        self.target = sample(
            context.model, context.adapter, context.config, context.scheduler, self.conditions, self.sampling,
            indices=range(params.prompts), reporter=context.reporter,
        )  # fmt: skip

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.logits)

    def rates(self) -> dict[str, float]:
        return self.own

    def loss(self, step: int, part: int) -> Tensor:
        """Reconstruction and regulariser; the former's gradient comes from the checkpointed pass."""
        fit, gradients = self.reconstruction(step, part)
        slope = torch.stack([(p * g).sum() for p, g in zip(self.logits.values(), gradients, strict=True)]).sum()
        return fit + (slope - slope.detach()) + self.params.beta * self.regulariser()

    def reconstruction(self, step: int, part: int) -> tuple[Tensor, list[Tensor]]:
        """Mean squared error of the last latents of one batch, and its gradient by the logits of every group."""
        walk, images = self.walk(step, part)
        noise = self.noise(step, part, walk.count)
        target = self.target[images].to(walk.start.device)
        return through_sampler(walk, lambda t: self.values(noise[t]), self.groups, [*self.logits.values()], target)

    def walk(self, step: int, part: int) -> tuple[Walk, list[int]]:
        """The sampler of one batch, and its images."""
        first = (step * self.params.accumulate + part) * self.params.images_each
        images = [(first + i) % self.params.prompts for i in range(min(self.params.images_each, self.params.prompts))]
        c = self.context
        given = self.conditions.take(images)
        return Walk(c.model, c.adapter, c.config, c.scheduler, given, self.sampling, images), images

    def noise(self, step: int, part: int, count: int) -> list[dict[str, Tensor]]:
        """Uniform draws of every gate, fresh for each of `count` steps, kept for the repeated pass."""
        draw = generator(self.context.seed, step, 2_000_000 + part)
        return [{n: torch.rand(len(v), generator=draw).to(v.device) for n, v in self.logits.items()}
                for _ in range(count)]  # fmt: skip

    def values(self, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gate values (n,) of every group."""
        return {name: gate(logit, noise[name], self.params.eps) for name, logit in self.logits.items()}

    def regulariser(self) -> Tensor:
        """For each kind of gates the mean over its groups of |l|_1 / n, |l|_2 / n, or the expected share of open
        gates; summed over kinds."""
        kinds: dict[tuple[bool, bool], list[Gates]] = {}
        for group in self.groups:
            kinds.setdefault((group.outputs, group.size > 1), []).append(group)
        return torch.stack([
            self.pull(members) * torch.stack([self.size_of(g) for g in members]).mean() for members in kinds.values()
        ]).sum()  # fmt: skip

    def size_of(self, group: Gates) -> Tensor:
        """The regulariser of one group."""
        logit = self.logits[group.name]
        if self.params.norm == 0:
            return torch.sigmoid(logit - OPEN).sum() / group.count
        value = torch.sigmoid(REG_SCALE * logit + REG_SHIFT) if self.params.reg_sigmoid else logit
        return torch.linalg.vector_norm(value, self.params.norm) / group.count

    def pull(self, members: Sequence[Gates]) -> float:
        """1, or with `budget` in proportion to how far the share of open gates of this kind is above what will stay,
        within -1..1."""
        if not self.params.budget:
            return 1.0
        gone = self.params.modulation if members[0].outputs else self.context.ratio
        logits = torch.cat([self.logits[group.name].detach() for group in members])
        excess = float((logits > 0).double().mean()) - (1 - gone)
        return max(-1.0, min(1.0, excess / BUDGET_WIDTH))
