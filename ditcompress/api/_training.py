"""The training stage of `quantize`: recipes whose steps learn their codes against the original model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions
from ..calibration.footprint import free_memory
from ..calibration.schedulers import load_scheduler
from ..calibration.trajectory import Sampling
from ..checkpoint.reader import Checkpoint
from ..console import Reporter
from ..distill.data import Trajectories
from ..distill.trainer import History as History
from ..distill.trainer import train
from ..errors import DitcompressError
from ..loading import load_model
from ..models import adapter_for
from ..models.base import Layout
from ..offload import device_of
from ..plan import Plan
from ..quantization import RecipeSteps
from ..quantization._runner import Runner
from ..quantization._trained import Imitation, Tuned, optional, trained_step
from ..recipe import Calibration, Recipe, Training
from .calibration import conditions_for, pick_device, settings_of


def learns(plan: Plan, recipe: Recipe, parameters: int, device: str, reporter: Reporter) -> bool:
    """Whether any step of the plan is trained. Steps that may be left out are, with a note, where memory does not hold
    a model of so many parameters three times in float32 (the original, its copy, the rounded weights)."""
    if recipe.training is None or all(trained_step(decision) is None for decision in plan.layers):
        return False
    if not all(map(optional, plan.layers)):
        return True
    needed, free = 12 * parameters, free_memory(pick_device(device))
    if needed > free:
        reporter.note(f"not trained: that needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    return needed <= free


def check_training(recipe: Recipe, plan: Plan) -> None:
    """E202 when steps learn and the recipe does not say how, or normalised outputs are not trained."""
    if recipe.training is None and not all(map(optional, plan.layers)):
        raise DitcompressError("E202", f"recipe {recipe.name}", "its steps are trained", "add a section training:")
    trained = recipe.training is not None and any(trained_step(decision) is not None for decision in plan.layers)
    for decision in plan.layers if trained else ():
        if decision.smooth == "fold":  # the producer is rounded after it has absorbed the smoothing
            raise DitcompressError("E202", decision.reason, "folded smoothing is not trained", "use smooth: online")
        if not optional(decision) and decision.rotate:
            raise DitcompressError("E202", decision.reason, "rotated inputs are not trained", "leave out rotate")


JUDGED = 64  # held-out states that decide how much of a training is kept


@dataclass(frozen=True)
class Driven:
    """A model with what drives it."""

    model: nn.Module
    adapter: ModuleType
    config: Mapping[str, Any]
    scheduler: Any
    conditions: Conditions
    guidance: float

    def runner(self, seed: int) -> Runner:
        """For steps that decide by running the model: a few steps of a few images."""
        sampling = Sampling(4, self.guidance, seed + 104729)
        return Runner(self.model, self.adapter, self.config, self.scheduler, self.conditions, sampling)


def driven(
    checkpoint: Checkpoint, calibration: Calibration, conditions: str | Path | None, scheduler: str | Path | None,
    seed: int, device: str, reporter: Reporter,
) -> Driven:  # fmt: skip
    """The model of a checkpoint on disk, in float32, with as many conditions as `calibration` has samples."""
    adapter = adapter_for(checkpoint.config)
    model, _ = load_model(checkpoint.path, dtype=torch.float32, device=pick_device(device))
    sampler = load_scheduler(
        checkpoint.config, Path(scheduler) if scheduler else checkpoint.scheduler_folder, adapter, reporter
    )
    given = conditions_for(checkpoint, adapter, settings_of(calibration, seed), conditions, reporter)
    guidance = guidance_of(calibration, adapter, checkpoint.config)
    return Driven(model, adapter, checkpoint.config, sampler, given, guidance)


def tune(
    by: Driven, layout: Layout, plan: Plan, statistics: Mapping[str, Any], recipe: Recipe, *, seed: int,
    journal: Path | None, reporter: Reporter,
) -> Tuned:  # fmt: skip
    """Train the plan's learning steps on the model, which is not changed."""
    wanted = recipe.training or Training()
    sampling = Sampling(wanted.sample_steps, by.guidance, seed + 7919, batch=wanted.images)
    after = all(map(optional, plan.layers))  # what is trained begins at a plan that is whole
    data = Trajectories(
        by.model, by.adapter, by.config, by.scheduler, by.conditions, sampling, images=wanted.images,
        refresh=wanted.refresh, null=wanted.null, held=max(1, wanted.images // 8) if after else 0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = Imitation(
            by.model, layout, plan, statistics, RecipeSteps(device=device_of(by.model)), data, batch=wanted.batch,
            total=wanted.steps, features=wanted.features, output=wanted.output, seed=seed,
        )  # fmt: skip
        try:
            history = train(task, wanted, journal=journal, reporter=reporter)
        finally:
            task.release()
    first, last = history.losses[0], sum(history.losses[-20:]) / len(history.losses[-20:])
    reporter.note(f"trained {len(history.losses)} steps: loss {first:.3g} -> {last:.3g}")
    if after and data.held and (share := task.settle(data.judging(wanted.steps - 1, JUDGED))) < 1:
        reporter.note(f"of what training changed {share:.0%} is kept: more of it is worse on held-out images")
    return task.result(history.losses)


def guidance_of(calibration: Calibration, adapter: ModuleType, config: Mapping[str, Any]) -> float:
    """The guidance of a calibration, else the family's usual one."""
    asked = calibration.guidance
    return float(adapter.default_guidance(config) if asked is None else asked)


class Overlay:
    """A source with some tensors replaced; all are read to the CPU."""

    def __init__(self, source: Any, tensors: Mapping[str, Tensor]) -> None:
        self.source, self.replaced = source, tensors

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.source.tensors  # type: ignore[no-any-return]

    def read(self, name: str) -> Tensor:
        original = self.source.read(name).cpu()
        return self.replaced[name].to(original.dtype) if name in self.replaced else original
