"""The calibration pass: the model runs along its own sampling trajectories, hooks gather what the methods need.

Every linear input is seen at both guidance branches. Image batches use slightly different numbers of steps, so the
timesteps are not only those of one sampler setting. With weighting "fisher" the Gram matrices count every token by how
strongly the model's output depends on it (sensitivity.py): low-noise steps are fragile, and rounding must respect
them first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.writer import load_atomic, save_atomic
from ..console import Reporter, Silent
from ..models.base import Layout
from ..ranks import ALONE, Ranks
from ..routed import everything_runs
from ..runtime.moe import MoEFeedForward, routed_parts
from .collector import CalibrationSettings as CalibrationSettings
from .collector import Collector, Share
from .conditions import Conditions
from .idle import fill_idle
from .sensitivity import token_weights
from .statistics import InputStatistics, Statistics, flatten, unflatten
from .trajectory import Sampling, StepRecord, generator, prepare, sample

FISHER_IMAGES, FISHER_CHUNK = 8, 4  # images of a batch that get a backward pass, and how many at once
STEP_OFFSETS = (0, -1, 1, -2, 2)
SAVE_EVERY_S = 20.0


def _attach(model: nn.Module, layout: Layout, collector: Collector) -> list[Any]:
    """Hooks on one reader of every input key (on all where they see different tokens), and on every block."""

    def input_hook(key: str) -> Callable[..., None]:
        return lambda module, args: collector.see(key, args[0])

    def block_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            outputs = output if isinstance(output, tuple) else (output,)
            same = [y for y in outputs if isinstance(y, Tensor) and isinstance(x, Tensor) and y.shape == x.shape]
            if same and isinstance(x, Tensor):
                collector.see_block(name, x, same[-1])

        return hook

    handles, hooked = [], set()
    for site in layout.sites:
        if site.input_key not in hooked or site.role == "attn_out":
            handles.append(model.get_submodule(site.name).register_forward_pre_hook(input_hook(site.input_key)))
            hooked.add(site.input_key)
    for block in layout.blocks:
        handles.append(model.get_submodule(block).register_forward_hook(block_hook(block), with_kwargs=True))
    return handles


def collect(
    model: nn.Module,
    adapter: ModuleType,
    config: Mapping[str, Any],
    layout: Layout,
    scheduler: Any,
    conditions: Conditions,
    settings: CalibrationSettings,
    *,
    journal: Path | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Statistics of `settings.samples` trajectories. With a journal folder an interrupted pass goes on where it was
    last saved, with the same result to the bit.

    Of several processes each runs its images of every batch, and the first one has the result (the others: empty
    statistics), equal to that of one process but for rounding. It saves for all, so that a pass may go on with another
    number of processes; a failure of one is raised in all at the end of the batch.
    """
    run = _Run(model, adapter, config, scheduler, conditions, settings, layout, ranks)
    batches = run.batches()
    done = ranks.lead(lambda: run.restore(journal))
    handles = _attach(model, layout, run.collector)
    saved = time.monotonic()
    try:
        with (reporter or Silent()).task("calibrate", sum(steps for _, steps in batches)) as advance:
            advance(sum(steps for _, steps in batches[:done]))
            for number in range(done, len(batches)):
                with ranks.together():
                    run.batch(number, *batches[number], advance)
                late = time.monotonic() - saved > SAVE_EVERY_S and number + 1 < len(batches)
                if ranks.agree(journal is not None and late):
                    run.save(journal, number + 1)
                    saved = time.monotonic()
    finally:
        for handle in handles:
            handle.remove()
    run.collector.merge(ranks)
    return run.result() if ranks.first else Statistics({}, {}, run.meta())


@dataclass
class _Run:
    model: nn.Module
    adapter: ModuleType
    config: Mapping[str, Any]
    scheduler: Any
    conditions: Conditions
    settings: CalibrationSettings
    layout: Layout
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.collector = Collector(self.settings)
        self.timesteps: list[list[float]] = []
        self.range = float(self.scheduler.config.get("num_train_timesteps", 1000))
        given = self.settings.guidance
        self.guidance = self.adapter.default_guidance(self.config) if given is None else given

    def batches(self) -> list[tuple[list[int], int]]:
        """Images and number of steps of each batch."""
        s = self.settings
        starts = range(0, s.samples, s.batch)
        vary = STEP_OFFSETS if s.policy == "uniform" else (0,)
        return [
            (
                list(range(i, min(i + s.batch, s.samples))),
                max(2, s.steps + vary[n % len(vary)]) if s.steps > 2 else s.steps,
            )
            for n, i in enumerate(starts)
        ]

    def batch(self, number: int, images: list[int], steps: int, advance: Callable[[int], None]) -> None:
        """One batch along its trajectory. The trajectory is recorded by a hook that runs before each forward, so the
        statistics are those of the forward passes that really happen."""
        places = self.ranks.own(range(len(images)))
        sampling = Sampling(steps, self.guidance, self.settings.seed, self.settings.batch)
        plan = _Steps(self, images, steps, number)
        self.timesteps.append(plan.times)
        if not places:
            return
        share = None if self.ranks.count == 1 else self.share(places, len(images))
        plan.begin(0, share)

        def on_step(record: StepRecord) -> None:
            if self.settings.weighting == "fisher":
                rows = None if plan.rows is None else plan.rows[record.index]
                self.weigh(record, images, places, rows, plan.seed(record.index))
            advance(1)
            if record.index + 1 < len(plan.times):
                plan.begin(record.index + 1, share)

        try:
            sample(
                self.model,
                self.adapter,
                self.config,
                self.scheduler,
                self.conditions,
                sampling,
                indices=[images[place] for place in places],
                on_step=on_step,
            )
        finally:
            self.collector.active = False

    @property
    def guided(self) -> bool:
        return self.conditions.null is not None and self.guidance != 1

    def share(self, places: Sequence[int], size: int) -> Share:
        """The rows of these places in a batch of `size`, conditional branch first."""
        rows = torch.tensor(places)
        return Share(torch.cat([rows, rows + size]), 2 * size) if self.guided else Share(rows, size)

    def weigh(
        self, record: StepRecord, images: list[int], places: Sequence[int], rows: Tensor | None, seed: int
    ) -> None:
        """Add this step's sensitivity-weighted Gram matrices, a few images at a time; `rows` (len(images),) are those
        that count at this step, None all; `places` those that this process runs."""
        self.collector.active = False
        counted = list(range(len(images))) if rows is None else rows.nonzero().flatten().tolist()
        for start in range(0, min(len(counted), FISHER_IMAGES), FISHER_CHUNK):
            chunk = counted[start : start + FISHER_CHUNK]
            self.collector.weighed += len(chunk) * (1 + self.guided)
            few = [place for place in chunk if place in places]
            if not few:
                continue
            given = self.conditions.take([images[place] for place in few])
            latents = record.model_input[[places.index(place) for place in few]]
            cond = dict(given.cond)
            if self.guided and given.null is not None:
                cond = {name: torch.cat([tensor, given.null[name]]) for name, tensor in cond.items()}
                latents = torch.cat([latents, latents])
            timestep = record.timestep.to(latents.device).expand(len(latents))
            among = None if len(few) == len(chunk) else self.share([chunk.index(place) for place in few], len(chunk))
            self._weigh(latents, timestep, cond, seed + start, among)

    def _weigh(
        self, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor], seed: int, among: Share | None
    ) -> None:
        """Of a few images; all their inputs are dropped before the next ones are run."""
        rows = None if among is None else (among.rows, among.size)
        found = token_weights(self.model, self.adapter, self.layout, latents, timestep, cond, seed, rows)
        for key, parts in found.items():
            for x, weight in parts:
                self.collector.weigh(key, x, weight)

    def bucket(self, index: int, steps: int, timestep: float) -> int:
        """The step itself where there is a bucket for each, else an equal part of the time range."""
        if self.settings.buckets >= steps and self.settings.policy == "all":
            return index
        return min(int(timestep / self.range * self.settings.buckets), self.settings.buckets - 1)

    def complete(self) -> None:
        """Inputs that routing never reached, or whose linear a routed attention does not call: those of one more batch
        in which everything runs."""
        wanted = {s.input_key for s in self.layout.sites if s.block} - set(self.collector.inputs)
        routed = any(not isinstance(part, MoEFeedForward) for part in routed_parts(self.model).values())
        if not wanted or not routed:
            return
        main, times = self.collector, list(self.timesteps)
        self.collector = Collector(self.settings)
        handles = _attach(self.model, self.layout, self.collector)
        try:
            with everything_runs(self.model):
                self.batch(0, *self.batches()[0], lambda steps: None)
            self.collector.average()
        finally:
            for handle in handles:
                handle.remove()
            extra, self.collector, self.timesteps = self.collector.inputs, main, times
        main.inputs.update({key: value for key, value in extra.items() if key in wanted})

    def result(self) -> Statistics:
        self.ranks = ALONE  # one process fills in what is missing
        self.collector.average()
        self.complete()
        counted = {key for key, value in self.collector.inputs.items() if value.gram is not None and value.gram.any()}
        fill_idle(self.model, self.layout, self.collector.inputs, self.settings.grams)
        inputs = {key: self.collector.inputs[key] for key in sorted(self.collector.inputs)}
        blocks = {k: (t[:, 0] / t[:, 1].clamp_min(1)).float() for k, t in sorted(self.collector.similarity.items())}
        for (
            value
        ) in inputs.values():  # buckets that no step fell into have an empty range: take the nearest that has one
            _fill_empty(value)
            _fill_unread(value)
        if self.settings.weighting == "fisher":
            _make_negligible(inputs, counted)
        return Statistics(inputs, blocks, self.meta())

    def meta(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "guidance": self.guidance, "timesteps": self.timesteps}

    def save(self, journal: Path | None, done: int) -> None:
        """The first process's state is that of all; the others go on with nothing."""
        self.collector.merge(self.ranks)
        self.ranks.lead(lambda: None if journal is None else self._save(journal, done))

    def _save(self, journal: Path, done: int) -> None:
        part = Statistics(self.collector.inputs, self.collector.similarity)
        facts = {"done": done, "timesteps": self.timesteps, "weighed": self.collector.weighed}
        save_atomic(journal / "state.safetensors", flatten(part), facts)

    def restore(self, journal: Path | None) -> int:
        """Number of batches that are already counted."""
        path = journal / "state.safetensors" if journal is not None else None
        if path is None or not path.exists():
            return 0
        tensors, facts = load_atomic(path)
        part = unflatten(tensors, {})
        self.collector.inputs, self.collector.similarity = part.inputs, part.blocks
        self.timesteps, self.collector.weighed = facts["timesteps"], facts["weighed"]
        return int(facts["done"])


class _Steps:
    """What each step of one batch counts as."""

    def __init__(self, run: _Run, images: Sequence[int], steps: int, number: int) -> None:
        self.run, self.images, self.number = run, list(images), number
        times = prepare(run.scheduler, steps, run.adapter, run.config).timesteps
        self.times = [float(t) for t in times]
        self.rows = self._normal() if run.settings.policy == "normal" else None

    def _normal(self) -> list[Tensor]:
        """For each step the images whose drawn timestep is nearest to it."""
        run, times = self.run, torch.tensor(self.times)
        drawn = torch.stack([
            0.4 * run.range + 0.4 * run.range * torch.randn(1, generator=generator(run.settings.seed, image, 10**6))[0]
            for image in self.images
        ]).clamp(0, run.range - 1)  # fmt: skip
        nearest = (drawn[:, None] - times[None]).abs().argmin(1)
        return [nearest == index for index in range(len(times))]

    def begin(self, index: int, share: Share | None) -> None:
        run, timestep = self.run, self.times[index]
        rows = None
        if self.rows is not None:
            rows = self.rows[index].repeat(2) if run.guided else self.rows[index]
        run.collector.begin(run.bucket(index, len(self.times), timestep), rows, self.seed(index), share)

    def seed(self, index: int) -> int:
        """A seed of its own for every batch and step."""
        return (self.run.settings.seed * 1_000_003 + self.number) * 10_007 + index


def _fill_unread(value: InputStatistics) -> None:
    """Where the model's output depends on none of the tokens (the text in the last block of Qwen-Image), an empty Gram
    matrix becomes that of the tokens themselves: a linear that counts for nothing is still rounded."""
    if value.gram is not None and not bool(value.gram.any()):
        value.gram.copy_(value.reservoir.T @ value.reservoir)


def _make_negligible(inputs: Mapping[str, InputStatistics], counted: set[str]) -> None:
    """Gram matrices that were filled in are not weighted: of their own scale they would seem to matter more than all
    others, where the output does not depend on them or seldom does."""
    least = min((float(inputs[key].gram.trace()) for key in counted), default=1.0)  # type: ignore[union-attr]
    for key in inputs.keys() - counted:
        gram = inputs[key].gram
        if gram is not None and gram.any():
            gram.mul_(1e-6 * least / float(gram.trace()))


def _fill_empty(value: InputStatistics) -> None:
    used = torch.isfinite(value.low[:, 0])
    if used.any() and not used.all():
        places = torch.nonzero(used).flatten()
        for bucket in torch.nonzero(~used).flatten().tolist():
            nearest = int(places[(places - bucket).abs().argmin()])
            value.low[bucket], value.high[bucket] = value.low[nearest], value.high[nearest]
