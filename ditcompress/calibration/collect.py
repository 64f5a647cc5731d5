"""The calibration pass: the model runs along its own sampling trajectories, hooks gather what the methods need.

Every linear input is seen at both guidance branches. Image batches use slightly different numbers of steps, so the
timesteps are not only those of one sampler setting. With weighting "fisher" the Gram matrices count every token by how
strongly the model's output depends on it (sensitivity.py): low-noise steps are fragile, and rounding must respect
them first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
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
from .collector import Collector
from .conditions import Conditions
from .idle import fill_idle
from .statistics import InputStatistics, Statistics, flatten, unflatten
from .walking import Abreast, Pass, Walker, walk_together

WALK = "walk."  # of names in a saved state
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
    abreast: Abreast | None = None,
) -> Statistics:
    """Statistics of `settings.samples` trajectories. With a journal folder an interrupted pass goes on where it was
    last saved, with the same result to the bit.

    It is saved between steps, and between batches where the scheduler keeps something that has no file form.

    `abreast`: how many batches go through an offloaded model together. Sums of several batches are then added step by
    step, which differs from batch by batch by float rounding.

    Of several processes each runs its images of every batch, and the first one has the result (the others: empty
    statistics), equal to that of one process but for rounding. It saves for all, after a batch, so that a pass may go
    on with another number of processes; a failure of one is raised in all at the end of the batch.
    """
    collector = Collector(settings)
    passes = Pass(model, adapter, config, scheduler, conditions, settings, layout, collector)
    run = _Run(passes, ranks, abreast or Abreast(), journal)
    handles = _attach(model, layout, collector)
    try:
        run.all(reporter or Silent())
    finally:
        for handle in handles:
            handle.remove()
    collector.merge(ranks)
    return run.result() if ranks.first else Statistics({}, {}, run.meta())


class _Run:
    """A pass over all batches, `abreast.batches` at a time."""

    def __init__(self, passes: Pass, ranks: Ranks, abreast: Abreast, journal: Path | None) -> None:
        self.passes, self.ranks, self.abreast, self.journal = passes, ranks, abreast, journal
        self.settings, self.collector = passes.settings, passes.collector
        self.timesteps: list[list[float]] = []
        self.done = 0  # batches
        self.waiting: dict[str, Any] = {}  # what was saved of batches on their way
        self.saved = time.monotonic()

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

    def all(self, reporter: Reporter) -> None:
        """Every batch that is not done yet."""
        batches = self.batches()
        self.ranks.lead(self.restore)
        self.done, under_way = self.ranks.share((self.done, len(self.waiting.get("walks", ()))))
        with reporter.task("calibrate", sum(steps for _, steps in batches)) as advance:
            advance(sum(steps for _, steps in batches[: self.done]))
            while self.done < len(batches):
                numbers = range(self.done, min(self.done + (under_way or self.abreast.batches), len(batches)))
                with self.ranks.together():
                    self.group(numbers, batches, advance, alone=under_way > 0)
                under_way = 0
                if self.ranks.agree(self._due() and self.done < len(batches)):
                    self.save([])

    def group(
        self, numbers: Sequence[int], batches: Sequence[tuple[list[int], int]], advance: Callable[[int], None],
        alone: bool = False,
    ) -> None:  # fmt: skip
        """Some batches along their trajectories, from where they were saved; `alone`: all by the first process, as one
        process began them."""
        walkers = []
        for number in numbers:
            images, steps = batches[number]
            places: Sequence[int] = range(len(images))
            places = self.ranks.own(places) if not alone else places if self.ranks.first else ()
            walkers.append(Walker(self.passes, number, images, steps, places))
            self.timesteps.append(walkers[-1].times)
        self._go_on(walkers, advance)
        while not all(walker.ended for walker in walkers):
            advance(walk_together(walkers, self.passes, self.abreast))
            if self.ranks.count == 1 and self._due() and not all(walker.ended for walker in walkers):
                self.save(walkers)
        self.done += len(numbers)

    def _due(self) -> bool:
        return self.journal is not None and time.monotonic() - self.saved > SAVE_EVERY_S

    def complete(self) -> None:
        """Inputs that routing never reached, or whose linear a routed attention does not call: those of one more batch
        in which everything runs."""
        wanted = {s.input_key for s in self.passes.layout.sites if s.block} - set(self.collector.inputs)
        model, layout = self.passes.model, self.passes.layout
        routed = any(not isinstance(part, MoEFeedForward) for part in routed_parts(model).values())
        if not wanted or not routed:
            return
        extra = Collector(self.settings)
        other = _Run(replace(self.passes, collector=extra), ALONE, Abreast(), None)
        handles = _attach(model, layout, extra)
        try:
            with everything_runs(model):
                other.group([0], self.batches(), lambda steps: None)
            extra.average()
        finally:
            for handle in handles:
                handle.remove()
        main = self.collector
        main.inputs.update({key: value for key, value in extra.inputs.items() if key in wanted})

    def result(self) -> Statistics:
        """One process fills in what is missing."""
        self.collector.average()
        self.complete()
        counted = {key for key, value in self.collector.inputs.items() if value.gram is not None and value.gram.any()}
        fill_idle(self.passes.model, self.passes.layout, self.collector.inputs, self.settings.grams)
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
        return {"settings": asdict(self.settings), "guidance": self.passes.guidance, "timesteps": self.timesteps}

    def save(self, walkers: Sequence[Walker]) -> None:
        """The first process's state is that of all, and the others go on with nothing; with the batches on their way,
        if every one of them has a file form."""
        states = [walker.state() for walker in walkers]
        if None in states:
            return
        self.collector.merge(self.ranks)
        self.ranks.lead(lambda: self._save([state for state in states if state is not None]))
        self.saved = time.monotonic()

    def _save(self, states: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        assert self.journal is not None
        tensors = flatten(Statistics(self.collector.inputs, self.collector.similarity))
        for place, (held, _) in enumerate(states):
            tensors |= {f"{place}|{WALK}{name}": tensor for name, tensor in held.items()}
        facts = {
            "done": self.done, "timesteps": self.timesteps[: self.done], "weighed": self.collector.weighed,
            "walks": [kept for _, kept in states],
        }  # fmt: skip
        save_atomic(self.journal / "state.safetensors", tensors, facts)

    def restore(self) -> None:
        """What was counted before an interruption."""
        path = self.journal / "state.safetensors" if self.journal is not None else None
        if path is None or not path.exists():
            return
        tensors, facts = load_atomic(path)
        part = unflatten(tensors, {})
        self.collector.inputs, self.collector.similarity = part.inputs, part.blocks
        self.timesteps, self.collector.weighed = facts["timesteps"], facts["weighed"]
        self.done, self.waiting = int(facts["done"]), {"walks": facts.get("walks", []), "tensors": tensors}

    def _go_on(self, walkers: Sequence[Walker], advance: Callable[[int], None]) -> None:
        """Put batches where they were when they were saved."""
        saved, self.waiting = self.waiting, {}
        for place, kept in enumerate(saved.get("walks", [])):
            start = f"{place}|{WALK}"
            held = {name[len(start) :]: t for name, t in saved["tensors"].items() if name.startswith(start)}
            walkers[place].go_on(held, kept)
            advance(walkers[place].at)


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
