"""FoldGPT (Liu et al. 2024, arXiv 2407.00928): learnable gates rank the blocks.

Every unit gets a gate a, and its blocks add g (output - input) with g = a^2 / (a^2 + e). As e falls, gates move to 0 or
1. Only the gates learn: the error of the whole model's prediction is made small together with |what is saved - target|.
All gates see each other, so unlike single removals the ranking knows of blocks that do the same work.

The paper trains on text and has no official code; here the states are those of the model's own trajectories.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..distill.data import Data
from ..distill.losses import output_loss
from ..distill.trainer import train
from ._learned import Gates, LearnedParams, Plain, gated, settings, states
from .base import Context, Scores

NEEDS = ("probes", "training")


class Params(LearnedParams):
    """`soft` and `hard`: e at both ends of the run; `pressure`: weight of the distance to the target, as a share of
    the cost of all units."""

    learning_rate: float = Field(1e-2, gt=0)
    soft: float = Field(0.1, gt=0)
    hard: float = Field(1e-3, gt=0)
    pressure: float = Field(1.0, gt=0)


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
        train(task, settings(params), journal=context.journal, reporter=context.reporter)
        opened = task.open(params.updates - 1).detach().tolist()
    return Scores(dict(zip(context.names, opened, strict=True)))
