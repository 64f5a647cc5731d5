"""The scheduler that drives a checkpoint: its own, a given one, or its family's usual one, said aloud; and how strongly
each of its steps uses the prediction."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch

from ..console import Reporter
from ..errors import DitcompressError
from ..registry import nearest
from ..runtime.coefficients import register


def load_scheduler(config: Mapping[str, Any], folder: Path | None, adapter: ModuleType, reporter: Reporter) -> Any:
    """The scheduler in `folder` (or in its `scheduler/`), else the family's usual one.

    E332 when the file does not parse or names no scheduler of diffusers.
    """
    if folder is None:
        scheduler = adapter.default_scheduler(config)
        reporter.note(f"no scheduler with the checkpoint: {type(scheduler).__name__} of its family is used")
        return scheduler
    path = folder / "scheduler_config.json"
    if not path.is_file() and (folder / "scheduler" / "scheduler_config.json").is_file():
        path = folder / "scheduler" / "scheduler_config.json"
    try:
        fields = json.loads(path.read_text())
        name = str(fields["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DitcompressError(
            "E332", path, "is no scheduler configuration", "give a folder with scheduler_config.json"
        ) from None
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise DitcompressError("E332", path, f"{name} is no scheduler of diffusers", nearest(name, known))
    register()  # a scheduler stored with step coefficients applies them
    try:
        return getattr(diffusers, name).from_config(fields)
    except (TypeError, ValueError, RuntimeError, ImportError, ArithmeticError) as error:
        raise DitcompressError("E332", path, f"does not build ({error})", "restore the original file") from None


def sampler_weights(
    scheduler: Any, steps: int, ready: Callable[[], Any] | None = None
) -> tuple[list[float], np.ndarray]:
    """Timesteps, and for each step the squared change of the next latent for a unit change of the prediction.

    Measured on the scheduler itself with scalar latents, so it holds for every diffusers scheduler. `ready` gives a
    fresh copy with its timesteps set, where more than their number is needed for that.
    """

    def plain() -> Any:
        fresh = copy.deepcopy(scheduler)
        fresh.set_timesteps(steps)
        return fresh

    ready = ready or plain
    weights, times = [], []
    probe = torch.zeros(1, 1, 1, 1)
    base = ready()
    count = len(base.timesteps)
    for index in range(count):
        moved = []
        for value in (0.0, 1e-2):
            trial = ready()
            if hasattr(trial, "_step_index"):
                trial._step_index = index if trial.step_index is None else trial.step_index
            generator = torch.Generator().manual_seed(0)
            try:
                out = trial.step(probe + value, trial.timesteps[index], probe, generator=generator, return_dict=False)[
                    0
                ]
            except TypeError:
                out = trial.step(probe + value, trial.timesteps[index], probe, return_dict=False)[0]
            moved.append(out.flatten()[0].item())
        times.append(float(base.timesteps[index]))
        weights.append(((moved[1] - moved[0]) / 1e-2) ** 2)
    return times, np.array(weights)
