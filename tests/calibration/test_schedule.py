"""The timesteps of a trajectory are those of the family's own pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ditcompress.calibration.trajectory import prepare
from ditcompress.models import flux, sd3

CONFIG = {"in_channels": 64, "sample_size": 128}


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
def test_flux_steps_are_those_of_its_pipeline(steps: int, dynamic: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0)
    found = prepare(scheduler, steps, flux, CONFIG).timesteps
    oracle = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    shift = {"mu": 1.15} if dynamic else {}  # 4096 image tokens: the upper end of the pipeline's line
    oracle.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
    assert torch.allclose(found, oracle.timesteps, rtol=1e-4)


def test_other_families_keep_the_steps_of_their_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = prepare(scheduler, 7, sd3, sd3.tiny().config).timesteps
    scheduler.set_timesteps(7)
    assert torch.equal(found, scheduler.timesteps)
