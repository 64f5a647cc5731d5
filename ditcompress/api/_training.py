"""The training stage of `quantize`: recipes whose steps learn their codes against the original model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions
from ..calibration.trajectory import Sampling
from ..console import Reporter
from ..distill.data import Trajectories
from ..distill.trainer import Settings, train
from ..errors import DitcompressError
from ..models.base import Layout
from ..plan import Plan
from ..quantization import RecipeSteps
from ..quantization._trained import Imitation, Tuned, trained_step
from ..recipe import Recipe, Training


def learns(plan: Plan) -> bool:
    """Whether any step of the plan is trained."""
    return any(trained_step(decision) is not None for decision in plan.layers)


def check_training(recipe: Recipe, plan: Plan) -> None:
    """E202 when steps learn and the recipe does not say how, or normalised outputs are not trained."""
    if learns(plan) and recipe.training is None:
        raise DitcompressError("E202", f"recipe {recipe.name}", "its steps are trained", "add a section training:")
    for decision in plan.layers:
        if trained_step(decision) is not None and decision.rotate:
            raise DitcompressError("E202", decision.reason, "rotated inputs are not trained", "leave out rotate")


def tune(
    model: nn.Module, adapter: ModuleType, config: Mapping[str, Any], layout: Layout, scheduler: Any,
    conditions: Conditions, plan: Plan, statistics: Mapping[str, Any], recipe: Recipe, *, seed: int,
    guidance: float, journal: Path | None, reporter: Reporter,
) -> Tuned:  # fmt: skip
    """Train the plan's learning steps on `model`, which is not changed."""
    wanted = recipe.training or Training()
    sampling = Sampling(wanted.sample_steps, guidance, seed + 7919, batch=wanted.images)
    data = Trajectories(
        model, adapter, config, scheduler, conditions, sampling, images=wanted.images, refresh=wanted.refresh,
        null=wanted.null,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = Imitation(
            model, layout, plan, statistics, RecipeSteps(), data, batch=wanted.batch, total=wanted.steps,
            features=wanted.features, output=wanted.output, seed=seed,
        )  # fmt: skip
        settings = Settings(**wanted.model_dump(include=set(Settings.model_fields)))
        history = train(task, settings, journal=journal, reporter=reporter)
    first, last = history.losses[0], sum(history.losses[-20:]) / len(history.losses[-20:])
    reporter.note(f"trained {len(history.losses)} steps: loss {first:.3g} -> {last:.3g}")
    return task.result(history.losses)


class Overlay:
    """A source with some tensors replaced."""

    def __init__(self, source: Any, tensors: Mapping[str, Tensor]) -> None:
        self.source, self.replaced = source, tensors

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.source.tensors  # type: ignore[no-any-return]

    def read(self, name: str) -> Tensor:
        original = self.source.read(name)
        return self.replaced[name].to(original.dtype) if name in self.replaced else original
