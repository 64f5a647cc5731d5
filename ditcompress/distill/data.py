"""Training states without data: points of the teacher's own sampling trajectories, renewed as training goes on.

Every state is a latent that the teacher met in sampling, the timestep that it was fed, and a condition; some are taken
without their condition, as guidance uses both branches. A state depends only on the seed and its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions
from ..calibration.trajectory import Sampling, StepRecord, generator, sample
from ..console import Reporter, Silent


@dataclass(frozen=True)
class Batch:
    """Forward arguments: latents (n, ...), timestep (n,), condition tensors by name."""

    latents: Tensor
    timestep: Tensor
    cond: Mapping[str, Tensor]


class Trajectories:
    """States of `images` trajectories at a time; each set serves `refresh` training steps."""

    def __init__(
        self, teacher: nn.Module, adapter: ModuleType, config: Mapping[str, Any], scheduler: Any,
        conditions: Conditions, sampling: Sampling, *, images: int = 128, refresh: int = 500, null: float = 0.15,
        reporter: Reporter | None = None,
    ) -> None:  # fmt: skip
        self.teacher, self.adapter, self.config, self.scheduler = teacher, adapter, config, scheduler
        self.conditions, self.sampling = conditions, sampling
        self.images, self.refresh, self.null = images, refresh, null if conditions.null is not None else 0.0
        self.reporter = reporter or Silent()
        self.number = -1
        self.latents = self.timesteps = torch.zeros(0)

    def batch(self, step: int, size: int, part: int = 0) -> Batch:
        """The states of one training step."""
        self._renew(step // self.refresh)
        draw = generator(self.sampling.seed, step, 1_000_000 + part)
        steps, images = self.latents.shape[:2]
        where = torch.randint(steps, (size,), generator=draw)
        image = torch.randint(images, (size,), generator=draw)
        dropped = torch.rand(size, generator=draw) < self.null
        chosen = self.conditions.take((image + self.number * self.images).tolist())
        cond = dict(chosen.cond)
        if chosen.null is not None:
            for name, tensor in cond.items():
                mask = dropped.reshape(-1, *[1] * (tensor.dim() - 1)).to(tensor.device)
                cond[name] = torch.where(mask, chosen.null[name], tensor)
        return Batch(self.latents[where, image], self.timesteps[where], cond)

    def _renew(self, number: int) -> None:
        """The trajectories of set `number`: other noise, the next conditions."""
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
        indices = list(range(first, first + self.images))
        sample(
            self.teacher, self.adapter, self.config, self.scheduler, self.conditions, sampling, indices=indices,
            on_step=keep, reporter=self.reporter,
        )  # fmt: skip
        self.latents, self.timesteps, self.number = torch.stack(latents), torch.stack(times), number
