"""Batches of a calibration pass on their way along their trajectories, several abreast where the model is offloaded.

What is read of an offloaded model's block serves all batches of a group: they take every step together (lockstep.py),
and so do the backward passes of that step. A group can be saved between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..lockstep import together
from ..models.base import Layout
from .collector import CalibrationSettings, Collector, Share
from .conditions import Conditions
from .sensitivity import see_token_weights
from .trajectory import Sampling, StepRecord, Walk, generator, prepare

FISHER_IMAGES, FISHER_CHUNK = 8, 4  # images of a batch that get a backward pass, and how many at once


@dataclass(frozen=True)
class Abreast:
    """How many batches go through an offloaded model together, and how many backward passes."""

    batches: int = 1
    backward: int = 1


@dataclass
class Pass:
    """What every batch of a calibration pass runs."""

    model: nn.Module
    adapter: ModuleType
    config: Mapping[str, Any]
    scheduler: Any
    conditions: Conditions
    settings: CalibrationSettings
    layout: Layout
    collector: Collector

    def __post_init__(self) -> None:
        self.range = float(self.scheduler.config.get("num_train_timesteps", 1000))
        given = self.settings.guidance
        self.guidance = self.adapter.default_guidance(self.config) if given is None else given

    @property
    def guided(self) -> bool:
        return self.conditions.null is not None and self.guidance != 1

    def share(self, places: Sequence[int], size: int) -> Share:
        """The rows of these places in a batch of `size`, conditional branch first."""
        rows = torch.tensor(places)
        return Share(torch.cat([rows, rows + size]), 2 * size) if self.guided else Share(rows, size)

    def bucket(self, index: int, steps: int, timestep: float) -> int:
        """The step itself where there is a bucket for each, else an equal part of the time range."""
        if self.settings.buckets >= steps and self.settings.policy == "all":
            return index
        return min(int(timestep / self.range * self.settings.buckets), self.settings.buckets - 1)


class Walker:
    """Batch `number`: its images `places` (those of this process) along `steps` steps."""

    def __init__(self, run: Pass, number: int, images: Sequence[int], steps: int, places: Sequence[int]) -> None:
        self.run, self.number, self.images, self.places = run, number, list(images), list(places)
        self.at = 0  # steps that are done
        times = prepare(run.scheduler, steps, run.adapter, run.config).timesteps
        self.times = [float(t) for t in times]
        self.rows = self._normal() if run.settings.policy == "normal" else None
        self.share = None if len(self.places) == len(self.images) else run.share(self.places, len(self.images))
        if self.places:
            own = [self.images[place] for place in self.places]
            sampling = Sampling(steps, run.guidance, run.settings.seed, run.settings.batch)
            given = run.conditions.take(own)
            self.walk = Walk(run.model, run.adapter, run.config, run.scheduler, given, sampling, own)
            self.latents = self.walk.start

    def _normal(self) -> list[Tensor]:
        """For each step the images whose drawn timestep is nearest to it."""
        run, times = self.run, torch.tensor(self.times)
        drawn = torch.stack([
            0.4 * run.range + 0.4 * run.range * torch.randn(1, generator=generator(run.settings.seed, image, 10**6))[0]
            for image in self.images
        ]).clamp(0, run.range - 1)  # fmt: skip
        nearest = (drawn[:, None] - times[None]).abs().argmin(1)
        return [nearest == index for index in range(len(times))]

    @property
    def ended(self) -> bool:
        return self.at == len(self.times) or not self.places

    @property
    def seed(self) -> int:
        """A seed of its own for every batch and step."""
        return (self.run.settings.seed * 1_000_003 + self.number) * 10_007 + self.at

    def step(self) -> StepRecord:
        """The next step, counted by the collector."""
        run, index = self.run, self.at
        records: list[StepRecord] = []
        rows = None if self.rows is None else self.rows[index]
        if rows is not None and run.guided:
            rows = rows.repeat(2)
        run.collector.begin(run.bucket(index, len(self.times), self.times[index]), rows, self.seed, self.share)
        try:
            self.latents = self.walk.step(index, self.latents, records.append)
        finally:
            run.collector.end()
        return records[0]

    def weighing(self, record: StepRecord) -> Iterator[Callable[[], None]]:
        """Jobs that add this step's sensitivity-weighted Gram matrices, of a few images each."""
        run = self.run
        rows = None if self.rows is None else self.rows[record.index]
        counted = list(range(len(self.images))) if rows is None else rows.nonzero().flatten().tolist()
        for start in range(0, min(len(counted), FISHER_IMAGES), FISHER_CHUNK):
            chunk = counted[start : start + FISHER_CHUNK]
            run.collector.weighed += len(chunk) * (1 + run.guided)
            few = [place for place in chunk if place in self.places]
            if few:
                yield self._weighing(record, chunk, few, self.seed + start)

    def _weighing(self, record: StepRecord, chunk: list[int], few: list[int], seed: int) -> Callable[[], None]:
        run = self.run
        given = run.conditions.take([self.images[place] for place in few])
        latents = record.model_input[[self.places.index(place) for place in few]]
        cond = dict(given.cond)
        if run.guided and given.null is not None:
            cond = {name: torch.cat([tensor, given.null[name]]) for name, tensor in cond.items()}
            latents = torch.cat([latents, latents])
        timestep = record.timestep.to(latents.device).expand(len(latents))
        among = None if len(few) == len(chunk) else run.share([chunk.index(place) for place in few], len(chunk))
        rows = None if among is None else (among.rows, among.size)

        def job() -> None:
            see_token_weights(
                run.model, run.adapter, run.layout, latents, timestep, cond, seed, rows, run.collector.weigh
            )

        return job

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `go_on` needs; None where the scheduler keeps something that has no file form."""
        kept = self.walk.stored()
        return None if kept is None else ({"latents": self.latents, **kept[0]}, {"at": self.at, "kept": kept[1]})

    def go_on(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        rest = dict(tensors)
        self.at, self.latents = int(facts["at"]), rest.pop("latents").to(self.latents.device)
        self.walk.go_on(rest, facts["kept"])


def walk_together(walkers: Sequence[Walker], run: Pass, abreast: Abreast) -> int:
    """One step of every batch that has not ended; how many took it."""
    walking = [walker for walker in walkers if not walker.ended]
    with torch.no_grad():
        records = together(run.model, [walker.step for walker in walking])
        if run.settings.weighting == "fisher":
            jobs = [job for walker, record in zip(walking, records, strict=True) for job in walker.weighing(record)]
            for start in range(0, len(jobs), abreast.backward):
                together(run.model, jobs[start : start + abreast.backward])
    for walker in walking:
        walker.at += 1
    return len(walking)
