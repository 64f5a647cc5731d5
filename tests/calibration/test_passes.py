"""Calibration passes leave the model as it was, count what the policy chose, and are the same on every run."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from ditcompress.calibration import walking as module
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.trajectory import Sampling, sample
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.models import dit, flux, pixart, sd3

SETTINGS = CalibrationSettings(samples=4, steps=3, policy="all", buckets=3, reservoir=48, batch=2, weighting="fisher")


def run(family: ModuleType, model: Any, settings: CalibrationSettings = SETTINGS) -> Any:
    conditions = get_conditions(ModuleSource(model), family, 4, 0)
    scheduler = family.default_scheduler(model.config)
    return collect(model, family, model.config, family.layout(model), scheduler, conditions, settings)


@pytest.mark.parametrize("family", [dit, pixart, sd3, flux])
def test_a_weighted_pass_leaves_no_gradient_and_reaches_every_linear(family: ModuleType) -> None:
    model = family.tiny()
    first = next(model.parameters())
    first.requires_grad_(False)
    found = run(family, model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p is not first for p in model.parameters()]
    for site in family.layout(model).sites:
        assert float(found.inputs[site.input_key].gram.diagonal().sum()) > 0, site.name


def test_parameters_take_gradients_again_after_a_failed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dit.tiny()
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("out")))
    with pytest.raises(RuntimeError, match="out"):
        run(dit, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_the_normal_policy_weighs_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[tuple[int, int]] = []
    inner = module.see_token_weights

    def spy(model: Any, adapter: Any, layout: Any, latents: Any, timestep: Any, *rest: Any) -> None:
        weighed.append((int(timestep[0]), len(latents)))
        inner(model, adapter, layout, latents, timestep, *rest)

    monkeypatch.setattr(module, "see_token_weights", spy)
    run(dit, dit.tiny(), replace(SETTINGS, policy="normal", steps=10, guidance=1.5))
    assert sum(count for _, count in weighed) == 2 * SETTINGS.samples  # both branches of every image


@pytest.mark.parametrize("weighting", ["none", "fisher"])
def test_gram_matrices_stay_semidefinite_under_bfloat16_autocast(weighting: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(dit, dit.tiny(), replace(SETTINGS, weighting=weighting))
    for key, value in found.inputs.items():
        assert value.gram.dtype == torch.float32
        eigenvalues = torch.linalg.eigvalsh(value.gram.double())
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1], key


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        EulerAncestralDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_stochastic_samplers_depend_on_their_seed_alone(scheduler: Any) -> None:
    model = dit.tiny()
    conditions = get_conditions(ModuleSource(model), dit, 4, 0)

    def draw(batch: int, seed: int, other: int) -> torch.Tensor:
        torch.manual_seed(other)
        return sample(model, dit, model.config, scheduler, conditions, Sampling(4, 1.5, seed, batch))

    whole = draw(4, 3, 0)
    assert torch.equal(draw(4, 3, 1), whole)
    assert float((draw(1, 3, 2) - whole).abs().max()) <= 1e-5 * float(whole.abs().max())
    assert not torch.allclose(draw(4, 4, 0), whole, rtol=0.1)
