"""The trainer: resumption to the same bits, divergence, schedules; its data and losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.trajectory import Sampling, generator
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.distill.data import Trajectories
from ditcompress.distill.losses import feature_loss, output_loss
from ditcompress.distill.settings import Settings
from ditcompress.distill.trainer import rate_at, train
from ditcompress.errors import DitcompressError
from ditcompress.models import registry as families


class Line:
    """Fit a line; breaks at the step `nan`, is killed at the step `killed`."""

    def __init__(self, nan: int = -1, killed: int = -1) -> None:
        self.weight = torch.zeros(3, requires_grad=True)
        self.bias = torch.zeros(1, requires_grad=True)
        self.nan, self.killed, self.count = nan, killed, torch.zeros(1)

    def parameters(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def rates(self) -> Mapping[str, float]:
        return {"bias": 1e-2}

    def loss(self, step: int, part: int) -> torch.Tensor:
        if step == self.killed:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=generator(0, step, part))
        loss = (x @ self.weight + self.bias - x.sum(1) - 1).square().mean()
        return loss * float("nan") if step == self.nan else loss

    def after_step(self, step: int) -> None:
        self.count += 1

    def extra(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def restore(self, extra: Mapping[str, torch.Tensor]) -> None:
        self.count.copy_(extra["count"])


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"accumulate": 3, "schedule": "constant"}])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    settings = Settings(steps=50, learning_rate=0.05, save_every=7, **more)
    whole, broken, again = Line(), Line(killed=33), Line()
    expected = train(whole, settings)
    with pytest.raises(KeyboardInterrupt):
        train(broken, settings, journal=tmp_path)
    found = train(again, settings, journal=tmp_path)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
    assert found.losses == expected.losses and again.count == 50
    assert expected.losses[-1] < 0.2 * expected.losses[0]
    finished = Line(killed=0)  # a finished run is not trained again
    train(finished, settings, journal=tmp_path)
    assert torch.equal(finished.weight, whole.weight)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    line = Line(nan=20)
    with pytest.raises(DitcompressError, match=r"E703.*step 20.*state of step 14 is kept"):
        train(line, Settings(steps=50, save_every=7), journal=tmp_path)
    assert torch.isfinite(line.weight).all() and line.count == 14


def test_the_rate_rises_and_falls() -> None:
    settings = Settings(steps=100, warmup=0.1)
    rates = [rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1 and rates[-1] < 0.01
    assert rate_at(99, Settings(steps=100, schedule="constant")) == 1


def test_states_depend_on_seed_and_step_only_and_come_from_the_trajectories() -> None:
    family = families.get("dit")
    model = family.tiny()
    source = ModuleSource(model)
    conditions = get_conditions(source, family, 8, 0)

    def data() -> Trajectories:
        return Trajectories(model, family, source.config, family.default_scheduler(source.config), conditions,
                            Sampling(4, 1.5, 3), images=6, refresh=10, null=0.5)  # fmt: skip

    one, other = data(), data()
    for step in (0, 3, 9):
        one.batch(step, 8)
    late = one.batch(12, 8)
    same = other.batch(12, 8)
    assert torch.equal(late.latents, same.latents) and torch.equal(late.cond["class_labels"], same.cond["class_labels"])
    assert not torch.equal(late.latents, one.batch(13, 8).latents)
    times = set(one.batch(14, 64).timestep.tolist())
    scheduler = family.default_scheduler(source.config)
    scheduler.set_timesteps(4)
    assert times == set(scheduler.timesteps.tolist())
    null = int(conditions.null["class_labels"][0])  # type: ignore[index]
    dropped = (one.batch(15, 400).cond["class_labels"] == null).float().mean()
    assert 0.4 < dropped < 0.6


def test_losses_are_relative() -> None:
    one, other = torch.randn(4, 10, generator=generator(0, 0)), torch.randn(4, 10, generator=generator(1, 0))
    assert output_loss(other, one) == pytest.approx(output_loss(100 * other, 100 * one).item(), rel=1e-5)
    assert output_loss(one, one) == 0 and output_loss(torch.zeros_like(one), one) == pytest.approx(1)
    assert feature_loss([one, other], [one, other]) == 0
    assert feature_loss([torch.zeros_like(one), other], [one, other]) == pytest.approx(0.5)
