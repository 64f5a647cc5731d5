"""Layers that see nothing, and steps that do not go together: a working model or one clear line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditcompress import api
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.measures import sqnr_db
from ditcompress.models import registry
from ditcompress.recipe import Recipe, load_recipe, parse_recipe

FEW = ["calibration.samples=4", "calibration.steps=3"]
CALIBRATION = {"samples": 4, "steps": 3, "weighting": "none"}
INT8 = {"format": "int", "bits": 8}


def recipe(**rule: Any) -> Recipe:
    return parse_recipe({"name": "odd", "calibration": CALIBRATION, "rules": [rule]}, "odd.yaml")


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    family = registry.get("dit")
    latents = torch.randn(2, *family.latent_shape(model.config), generator=torch.Generator().manual_seed(1))
    cond = family.random_conditions(model.config, 2, torch.Generator().manual_seed(2))
    found: Tensor = family.predict(model, latents, torch.tensor([400, 400]), cond)
    return found


@pytest.fixture(scope="module")
def silent() -> nn.Module:
    """A model in which a linear reads nothing but zeros."""
    model: Any = registry.get("dit").tiny()
    value = model.transformer_blocks[0].attn1.to_v
    with torch.no_grad():
        value.weight.zero_(), value.bias.zero_()
    return model


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_input_of_zeros_has_a_scale(symmetric: bool, silent: nn.Module) -> None:
    static = {"mode": "static", "symmetric": symmetric}
    made = api.quantize(silent, recipe(weight=INT8, activation=static, steps=["rtn"])).model
    assert made is not None and output(made).isfinite().all()


@pytest.mark.parametrize("name", ["w4a8", "w8a8", "svdquant-w4a4"])
def test_weights_that_read_zeros_are_rounded_to_nearest(name: str, silent: nn.Module) -> None:
    made = api.quantize(silent, load_recipe(name, FEW), reporter=Silent()).model
    assert made is not None and sqnr_db(output(silent), output(made)) > 12


def test_loftq_approximates_what_a_rotated_input_meets() -> None:
    model = registry.get("dit").tiny()
    plain, turned = (
        api.quantize(copy.deepcopy(model), recipe(weight=INT8, steps=["loftq"], rank=4, **more))
        for more in ({}, {"rotate": 16})
    )
    worst = [min(r.weight_sqnr_db or 99 for r in made.records) for made in (plain, turned)]
    assert worst[1] > worst[0] - 3 and sqnr_db(output(model), output(turned.model)) > 30  # type: ignore[arg-type]


def test_loftq_refuses_a_smoothed_and_rotated_input() -> None:
    columns = {**INT8, "layout": "column_group", "group": 16}
    both = recipe(weight=columns, steps=["smooth", "loftq"], smooth="online", rotate=16, rank=4)
    with pytest.raises(DitcompressError, match=r"E202.*loftq smooths after rounding"):
        api.quantize(registry.get("dit").tiny(), both)


@pytest.mark.parametrize(
    ("steps", "weight", "word"),
    [(["hq_dit", "rtn"], INT8, "element"), (["q_dit", "gptq"], {"format": "vq"}, "group"),
     (["vidit_mp", "rtn"], {"format": "nf4"}, "bits")],
)  # fmt: skip
def test_a_step_that_sets_what_the_format_lacks_is_refused(steps: list[str], weight: Any, word: str) -> None:
    with pytest.raises(DitcompressError, match=rf"E202.*chooses {word}, which format"):
        api.quantize(registry.get("dit").tiny(), recipe(weight=weight, steps=steps))
