"""A context for methods that learn: states that are drawn at random instead of sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn

from ditcompress.distill.data import EVERY, Batch
from ditcompress.models import registry
from ditcompress.pruning import Context

from .test_methods import context


class Random:
    """Training states of one family: noise at random timesteps."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.adapter, self.config = registry.get(name), dict(model.config)  # type: ignore[arg-type]
        self.scheduler = DDPMScheduler()

    def batch(self, step: int, size: int, part: int = 0, rows: slice = EVERY) -> Batch:
        draw = torch.Generator().manual_seed(1000 * step + part)
        latents = torch.randn((size, *self.adapter.latent_shape(self.config)), generator=draw)
        timestep = torch.randint(100, 900, (size,), generator=draw)
        return Batch(latents, timestep, self.adapter.random_conditions(self.config, size, draw))


class Dying(Random):
    """Those of a run that is killed at its sixth update."""

    def batch(self, step: int, size: int, part: int = 0, rows: slice = EVERY) -> Batch:
        if step == 5:
            raise KeyboardInterrupt
        return super().batch(step, size, part, rows)


def learning(name: str, model: nn.Module, target: float = 0.5, kind: type[Random] = Random) -> Context:
    """`context` with such states."""
    data: Callable[..., Any] = lambda **_: kind(name, model)  # noqa: E731
    return replace(context(name, model, target), data=data)
