"""The inputs at which depth methods look at a model: steps of its own sampling trajectories, both guidance branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..calibration.conditions import Conditions
from ..calibration.schedulers import sampler_weights
from ..calibration.trajectory import Sampling, StepRecord, prepare, sample
from ..console import Reporter
from .base import Probe, ProbeParams


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` step indices spread evenly over `total`, first and last included; 0 means all."""
    count = min(wanted or total, total)
    return sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})


def gathered(weights: Sequence[float], chosen: Sequence[int]) -> dict[int, float]:
    """The weight of each chosen step with those of the skipped steps that are nearest to it (the earlier of two)."""
    found = dict.fromkeys(chosen, 0.0)
    for step, weight in enumerate(weights):
        found[min(chosen, key=lambda place: (abs(place - step), place))] += weight
    return found


def record_probes(
    model: nn.Module,
    adapter: ModuleType,
    config: Mapping[str, Any],
    scheduler: Any,
    conditions: Conditions,
    params: ProbeParams,
    seed: int,
    reporter: Reporter,
) -> list[Probe]:
    """Run `params.samples` trajectories of the whole model and keep their inputs at the chosen steps, on the CPU."""
    guidance = adapter.default_guidance(config) if params.guidance is None else params.guidance
    guided = conditions.null is not None and guidance != 1
    ready = partial(prepare, scheduler, params.steps, adapter, config)
    _, weights = sampler_weights(scheduler, params.steps, ready)
    chosen = gathered(weights.tolist(), spread(len(weights), params.timesteps))
    probes: list[Probe] = []
    images: Sequence[int] = ()

    def keep(record: StepRecord) -> None:
        if record.index not in chosen:
            return
        given = conditions.take(images)
        latents, cond = record.model_input, dict(given.cond)
        if guided and given.null is not None:
            latents = torch.cat([latents, latents])
            cond = {name: torch.cat([tensor, given.null[name]]) for name, tensor in cond.items()}
        timestep = record.timestep.cpu().expand(len(latents))
        probes.append(Probe(record.index, latents.cpu(), timestep, cond, chosen[record.index]))

    sampling = Sampling(params.steps, guidance, seed, params.batch)
    with reporter.task("trajectories", params.samples) as advance:
        for start in range(0, params.samples, params.batch):
            images = range(start, min(start + params.batch, params.samples))
            sample(model, adapter, config, scheduler, conditions, sampling, indices=images, on_step=keep)
            advance(len(images))
    return probes
