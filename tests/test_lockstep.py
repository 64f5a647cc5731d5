"""Passes side by side through an offloaded model: each block is read once for all, and every job is as if alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditcompress import api
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.statistics import Statistics
from ditcompress.calibration.walking import Abreast
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.loading import load_model
from ditcompress.lockstep import together
from ditcompress.models import dit
from ditcompress.offload import ATTRIBUTE, Parts, load_to_run

from .pruning.models import deep, inputs, run
from .pruning.test_methods import context
from .test_offload import empty_inside, same_statistics

SETTINGS = CalibrationSettings(samples=6, steps=3, guidance=1.5, policy="all", buckets=3, reservoir=48, batch=2)
MATRIX = "transformer_blocks.2.ff.net.2.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lockstep") / "dit"
    deep("dit").save_pretrained(path)  # type: ignore[operator]
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was read from the checkpoint."""
    found: Counter[str] = Counter()
    original = Parts._read

    def read(self: Parts, name: str, stored: str) -> torch.Tensor:
        found[name] += 1
        return original(self, name, stored)

    monkeypatch.setattr(Parts, "_read", read)
    return found


def offloaded(folder: Path) -> nn.Module:
    return load_to_run(folder, dtype=torch.float32, offload="disk")[0]


def gather(model: nn.Module, settings: CalibrationSettings = SETTINGS, **options: Any) -> Statistics:
    given: Any = model.config
    conditions = get_conditions(ModuleSource(deep("dit")), dit, settings.samples, 0)
    scheduler = dit.default_scheduler(given)
    return collect(model, dit, given, dit.layout(model), scheduler, conditions, settings, **options)


def clean(model: nn.Module) -> bool:
    parts: Parts = getattr(model, ATTRIBUTE)
    hooks = any(module._forward_pre_hooks for module in model.modules())
    threads = [thread for thread in threading.enumerate() if type(thread).__name__ == "_Job"]
    return empty_inside(model) and parts.held is None and parts.watched is None and not hooks and not threads


def test_jobs_read_every_block_once_and_give_what_they_give_alone(folder: Path, reads: Counter[str]) -> None:
    model = offloaded(folder)
    given = [inputs("dit", model) for _ in range(3)]
    alone = [run("dit", model, one) for one in given]
    assert reads[MATRIX] == 3
    reads.clear()
    found = together(model, [lambda one=one: run("dit", model, one) for one in given])  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert reads[MATRIX] == 1 and clean(model)


def test_a_job_may_run_the_model_several_times_and_others_fewer(folder: Path) -> None:
    model = offloaded(folder)
    one = inputs("dit", model)
    once = run("dit", model, one)

    def times(count: int) -> Any:
        return lambda: [run("dit", model, one) for _ in range(count)]

    found = together(model, [times(2), times(0), times(3), times(1)])
    assert [len(results) for results in found] == [2, 0, 3, 1]
    assert all(torch.equal(once, result) for results in found for result in results)


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_failure_of_one_job_ends_all(folder: Path, error: BaseException) -> None:
    model, calls = offloaded(folder), []
    one = inputs("dit", model)

    def fails() -> None:
        handle = model.get_submodule("transformer_blocks.1").register_forward_pre_hook(lambda *_: stop())
        try:
            run("dit", model, one)
        finally:
            handle.remove()

    def stop() -> None:
        raise error

    def works() -> None:
        try:
            run("dit", model, one)
        finally:
            calls.append("unwound")

    with pytest.raises(type(error)):
        together(model, [works, fails, works])
    assert calls == ["unwound"] * 2 and clean(model)
    assert run("dit", model, one) is not None


@pytest.mark.parametrize("weighting", ["none", "fisher"])
def test_batches_abreast_read_less_and_gather_the_same(folder: Path, reads: Counter[str], weighting: Any) -> None:
    settings = replace(SETTINGS, weighting=weighting)
    model = offloaded(folder)
    apart = gather(model, settings)
    alone, each = reads[MATRIX], 1 if weighting == "none" else 3  # forward; and forward and backward of a gradient
    reads.clear()
    joined = gather(model, settings, abreast=Abreast(3, 3))
    assert (alone, reads[MATRIX]) == (3 * 3 * each, 3 * each) and clean(model)
    assert joined.meta == apart.meta
    for key, one in joined.inputs.items():
        other = apart.inputs[key]
        assert torch.equal(one.low, other.low) and torch.equal(one.priority, other.priority)
        assert torch.equal(one.reservoir, other.reservoir)
        assert torch.allclose(one.gram, other.gram, rtol=1e-4, atol=1e-5 * float(other.gram.abs().max()))


class Stop:
    """Interrupts a pass after so many steps of batches."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None

    def task(self, *args: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def counted() -> Iterator[Any]:
            def advance(units: int) -> None:
                self.left -= units
                if self.left < 0:
                    raise KeyboardInterrupt

            yield advance

        return counted()


@pytest.mark.parametrize("weighting", ["none", "fisher"])
def test_an_interrupted_group_goes_on_within_its_trajectories(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str], weighting: Any
) -> None:
    monkeypatch.setattr("ditcompress.calibration.collect.SAVE_EVERY_S", -1.0)
    settings = replace(SETTINGS, weighting=weighting, policy="uniform", steps=5)
    whole = gather(offloaded(folder), settings, abreast=Abreast(3, 3))
    passes = reads[MATRIX]
    reads.clear()
    with pytest.raises(KeyboardInterrupt):
        gather(offloaded(folder), settings, abreast=Abreast(3, 3), journal=tmp_path, reporter=Stop(10))
    before = reads[MATRIX]
    resumed = gather(offloaded(folder), settings, abreast=Abreast(3, 3), journal=tmp_path)
    assert resumed.digest == whole.digest and resumed.meta == whole.meta
    assert before < passes and reads[MATRIX] <= passes + passes // 5  # the step that was interrupted is taken again
    same_statistics(resumed, gather(offloaded(folder), settings, abreast=Abreast(3, 1)), ["transformer_blocks"])
    with pytest.raises(KeyboardInterrupt):
        gather(offloaded(folder), settings, abreast=Abreast(3, 3), journal=tmp_path, reporter=Stop(13))
    resident = load_model(folder, dtype=torch.float32)[0]
    same_statistics(resumed, gather(resident, settings, journal=tmp_path), ["transformer_blocks"])


def test_probes_abreast_without_blocks_have_the_same_errors(folder: Path, reads: Counter[str]) -> None:
    model = offloaded(folder)
    one = context("dit", model)
    found = [one.errors(["transformer_blocks.1"])]
    alone = reads[MATRIX]
    assert alone == 2 * len(one.probes)  # with and without the block
    several = context("dit", model)
    several.abreast = len(one.probes)
    reads.clear()
    found.append(several.errors(["transformer_blocks.1"]))
    assert found[0] == found[1] and reads[MATRIX] == 2 and clean(model)


def test_blocks_that_a_router_chooses_are_run_pass_by_pass(folder: Path, tmp_path: Path) -> None:
    """A group of blocks remembers one pass's choice."""
    few = ["calibration.samples=18", "calibration.steps=2", "calibration.guidance=1.5"]
    api.moe(folder, tmp_path / "moe", method="random", blocks_active=0.5, overrides=few[:2])
    first, second = (api.calibrate(tmp_path / "moe", overrides=few, offload=way) for way in ("none", "disk"))
    assert first.digest == second.digest
