"""Calibration passes leave the model as it was, count what the policy chose, and are the same on every run."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from ditcompress.calibration import collect as module
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.statistics import InputStatistics, merge_inputs
from ditcompress.calibration.trajectory import Sampling, sample
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.errors import DitcompressError
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
    inner = module.token_weights

    def spy(model: Any, adapter: Any, layout: Any, latents: Any, timestep: Any, *rest: Any) -> Any:
        weighed.append((int(timestep[0]), len(latents)))
        return inner(model, adapter, layout, latents, timestep, *rest)

    monkeypatch.setattr(module, "token_weights", spy)
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


def part_of(tokens: torch.Tensor, bucket: int, seed: int) -> InputStatistics:
    """Statistics of tokens (n, K) that all fell into one of two buckets."""
    low, high = (torch.full((2, tokens.shape[1]), sign * float("inf")) for sign in (1, -1))
    low[bucket], high[bucket] = tokens.amin(0), tokens.amax(0)
    priority = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    count, place = torch.tensor([float(len(tokens))], dtype=torch.float64), torch.full((len(tokens),), bucket).int()
    return InputStatistics(low, high, tokens.double().sum(0), count, tokens.T @ tokens, tokens, place, priority)


def test_merged_parts_describe_all_their_tokens() -> None:
    tokens = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    first, second = part_of(tokens[:40], 0, 1), part_of(tokens[40:], 1, 2)
    whole = merge_inputs(first, second, 8)
    assert whole.gram is not None and torch.allclose(whole.gram, tokens.T @ tokens, atol=1e-4)
    assert torch.allclose(whole.mean, tokens.double().mean(0))
    assert torch.equal(whole.absmax.amax(0), tokens.abs().amax(0))
    assert torch.equal(whole.low[0], tokens[:40].amin(0)) and torch.equal(whole.low[1], tokens[40:].amin(0))
    best = [first.priority.topk(8).values, second.priority.topk(8).values]
    assert torch.equal(whole.priority, torch.cat(best))
    swapped = merge_inputs(second, first, 8)
    assert torch.equal(swapped.reservoir, whole.reservoir)
    with pytest.raises(DitcompressError, match="E331"):
        merge_inputs(first, replace(second, gram=None), 8)
