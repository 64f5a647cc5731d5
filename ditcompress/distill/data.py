"""Training states without data: points of the teacher's own sampling trajectories, renewed as training goes on.

Every state is a latent that the teacher met in sampling, the timestep that it was fed, and a condition; some are taken
without their condition, as guidance uses both branches. A state depends only on the seed and its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions
from ..calibration.trajectory import Sampling, StepRecord, generator, sample
from ..console import Reporter, Silent
from ..ranks import ALONE, Ranks

EVERY = slice(None)


@dataclass(frozen=True)
class Batch:
    """Forward arguments: latents (n, ...), timestep (n,), condition tensors by name; `target` (n, ...) is what a
    perfect model predicts, where that is known."""

    latents: Tensor
    timestep: Tensor
    cond: Mapping[str, Tensor]
    target: Tensor | None = None


class Data(Protocol):
    """Where training states come from."""

    adapter: ModuleType

    def batch(self, step: int, size: int, part: int = 0, rows: slice = EVERY) -> Batch:
        """The states `rows` of the `size` of one training step: the same whatever `rows` is."""


def dropped_out(cond: Mapping[str, Tensor], null: Mapping[str, Tensor] | None, dropped: Tensor) -> dict[str, Tensor]:
    """Conditions (n, ...) with those of the samples `dropped` (n,) replaced by the unconditional ones."""
    if null is None:
        return dict(cond)
    found = {}
    for name, tensor in cond.items():
        mask = dropped.reshape(-1, *[1] * (tensor.dim() - 1)).to(tensor.device)
        found[name] = torch.where(mask, null[name], tensor)
    return found


class Trajectories:
    """States of `images` trajectories at a time; each set serves `refresh` training steps. The last `held` images of a
    set are never trained on: they are for judging (`judging`)."""

    def __init__(
        self, teacher: nn.Module, adapter: ModuleType, config: Mapping[str, Any], scheduler: Any,
        conditions: Conditions, sampling: Sampling, *, images: int = 128, refresh: int = 500, null: float = 0.15,
        held: int = 0, reporter: Reporter | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.teacher, self.adapter, self.config, self.scheduler = teacher, adapter, config, scheduler
        self.conditions, self.sampling = conditions, sampling
        self.images, self.refresh, self.null = images, refresh, null if conditions.null is not None else 0.0
        self.reporter, self.ranks = reporter or Silent(), ranks
        self.held, self.number = min(held, images - 1), -1
        self.latents = self.timesteps = torch.zeros(0)

    def batch(self, step: int, size: int, part: int = 0, rows: slice = EVERY) -> Batch:
        """The states of one training step."""
        self._renew(step // self.refresh)
        draw = generator(self.sampling.seed, step, 1_000_000 + part)
        steps, images = self.latents.shape[:2]
        where = torch.randint(steps, (size,), generator=draw)[rows]
        image = torch.randint(images - self.held, (size,), generator=draw)[rows]
        dropped = (torch.rand(size, generator=draw) < self.null)[rows]
        return self._states(where, image, dropped)

    def judging(self, step: int, size: int) -> Batch:
        """At most `size` states of the held images of the set that serves `step`, spread evenly over the sampler's
        steps, with their conditions."""
        self._renew(step // self.refresh)
        steps, images = self.latents.shape[:2]
        count = min(size, steps * self.held)
        rounds = -(-count // steps)  # over all steps, each with another image
        places = torch.arange(count) if count > steps else torch.arange(count) * steps // count
        where, image = places % steps, images - self.held + places // steps * self.held // rounds
        return self._states(where, image, torch.zeros(len(where), dtype=torch.bool))

    def _states(self, where: Tensor, image: Tensor, dropped: Tensor) -> Batch:
        """The states of steps `where` (n,) of the images (n,) of the set, the `dropped` ones without condition."""
        chosen = self.conditions.take((image + self.number * self.images).tolist())
        cond = dropped_out(chosen.cond, chosen.null, dropped)
        return Batch(self.latents[where, image], self.timesteps[where], cond)

    def _renew(self, number: int) -> None:
        """The trajectories of set `number`: other noise, the next conditions. Every rank samples its share of them."""
        if number == self.number:
            return
        latents: list[Tensor] = []
        times: list[Tensor] = []
        first = number * self.images

        def keep(record: StepRecord) -> None:
            if record.index == len(latents):
                latents.append(record.model_input)
                times.append(record.timestep)
            else:
                latents[record.index] = torch.cat([latents[record.index], record.model_input])

        sampling = replace(self.sampling, batch=min(self.images, self.sampling.batch))
        each = -(-self.images // self.ranks.count)
        share = range(self.ranks.rank * each, (self.ranks.rank + 1) * each)
        indices = [first + min(image, self.images - 1) for image in share]  # the last share may repeat an image
        sample(
            self.teacher, self.adapter, self.config, self.scheduler, self.conditions, sampling, indices=indices,
            on_step=keep, reporter=self.reporter,
        )  # fmt: skip
        self.latents = self.ranks.gather(torch.stack(latents), dim=1)[:, : self.images]  # (steps, images, ...)
        self.timesteps, self.number = torch.stack(times), number
