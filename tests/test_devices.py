"""Choosing and rounding happen on the device that is asked for: on a pretend one, with the CPU's results to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditcompress import engine, recipe
from ditcompress.api._quantized import Memory
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.conditions import get_conditions
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.models import registry as families
from ditcompress.plan import Plan
from ditcompress.quantization import RecipeSteps, choose, measures
from ditcompress.quantization._trained import optional

from .pretend import DEVICE, Pretending, There
from .test_engine import quick


def distinct() -> list[str]:
    """Recipes that differ in their steps or formats."""
    found: dict[Any, str] = {}
    for name in sorted(recipe.recipe_files()):
        chosen = recipe.load_recipe(name)
        if chosen.backend != "bitsandbytes":
            rules = [([s.name for s in r.steps], r.weight and r.weight.format) for r in chosen.rules]
            found.setdefault(repr(rules), name)
    return sorted(found.values())


def test_the_pretend_device_refuses_tensors_of_the_cpu() -> None:
    with Pretending():
        there = torch.ones(3, 4).to(DEVICE)
        assert isinstance(there, There) and there.device == DEVICE and there[1:].double().device == DEVICE
        assert torch.zeros(2, device=DEVICE).device == DEVICE and (there * 2.0).cpu().sum() == 24
        with pytest.raises(RuntimeError, match="on the accelerator and on the CPU"):
            there + torch.ones(3, 4)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return families.get("dit").tiny()


@pytest.fixture(scope="module")
def statistics(model: Any) -> dict[str, Any]:
    family = families.get("dit")
    settings = CalibrationSettings(samples=2, steps=2, buckets=2, reservoir=64)
    conditions = get_conditions(ModuleSource(model), family, 2, 0)
    scheduler = family.default_scheduler(model.config)
    layout = family.layout(model)
    return collect(model, family, model.config, layout, scheduler, conditions, settings).inputs


@pytest.mark.parametrize("name", distinct())
def test_every_recipe_gives_the_same_bytes_there(name: str, model: Any, statistics: dict[str, Any]) -> None:
    layout, source = families.get("dit").layout(model), ModuleSource(model)
    found = quick(name)
    roles = {decision.role: decision for decision in recipe.make_plan(found, layout).layers}
    plan = Plan((roles["attn_out"],))  # it is narrow, so this is quick
    if found.training is not None and not all(map(optional, plan.layers)):
        pytest.skip("its codes are trained")
    if measures(plan):
        pytest.skip("decides by running the model")
    if name == "hq-dit-w4a4":
        pytest.skip("torch.quantile allocates on the device itself, past the dispatcher")
    made = []
    for device in (torch.device("cpu"), DEVICE):
        sink = Memory()
        with Pretending():
            chosen = choose(plan, layout, source.read, statistics, device=device)
            engine.run(source, layout, chosen, statistics, RecipeSteps(device=device), sink)
        made.append(sink.tensors)
    assert made[0].keys() == made[1].keys()
    assert not any(isinstance(t, There) or not torch.equal(t, made[0][n]) for n, t in made[1].items())
