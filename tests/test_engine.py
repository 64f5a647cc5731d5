"""The block loop: every family, folding that preserves the function, resuming that preserves the bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditcompress import api, engine, recipe
from ditcompress.api._quantized import Memory
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.plan import StepSpec
from ditcompress.quantization import RecipeSteps, check_plan

from .pruning.models import deep

NAMES = [n for n in families.names() if n != "generic"]


def forward(family: Any, model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, *family.latent_shape(model.config), generator=generator)
    cond = family.random_conditions(model.config, 2, generator)
    with torch.no_grad():
        return family.predict(model, latents, torch.tensor([500.0, 20.0]), cond)


def _pairs() -> list[tuple[str, str]]:
    """Our recipes on every family; faithful ones, which differ in their steps alone, on DiT and one other in turn."""
    found, others = [], [name for name in NAMES if name != "dit"]
    for number, (chosen, file) in enumerate(sorted(recipe.recipe_files().items())):
        some = ["dit", others[number % len(others)]] if "faithful" in str(file) else NAMES
        found += [(name, chosen) for name in some]
    return found


@pytest.mark.parametrize(("name", "recipe_name"), _pairs())
def test_every_recipe_works_on_every_family(name: str, recipe_name: str, tmp_path: Path) -> None:
    family = families.get(name)
    model = family.tiny()
    chosen = quick(recipe_name)
    if chosen.backend == "bitsandbytes":  # writes folders only
        model.save_pretrained(tmp_path / "model")
        result = api.quantize(tmp_path / "model", chosen, tmp_path / "out")
        compressed = load_model(tmp_path / "out")[0]
    else:
        result = api.quantize(model, chosen)
        compressed = result.model
    assert compressed is not None and result.records
    before, after = forward(family, model), forward(family, compressed)
    relative = float((after - before).norm() / before.norm())
    assert 0 < relative < (0.1 if "w8" in recipe_name else 1.5 if "ter" in recipe_name else 0.8)


SMALL = ["calibration.samples=2", "calibration.steps=2"]
LESS = {
    "gptq": {"sweeps": 1, "refit": 1},
    "svdquant": {"grid": 3, "iterations": 2},
    "ptq4dm": {"points": 20, "zeros": 16},
}


def quick(name: str) -> recipe.Recipe:
    """The shipped recipe with few inputs and short searches."""
    found = recipe.load_recipe(name, SMALL if recipe.load_recipe(name).calibration else [])
    rules = []
    for rule in found.rules:
        steps = [StepSpec(s.name, {**s.params, **LESS.get(s.name, {})}) for s in rule.steps]
        steps = [StepSpec(s.name, {**s.params, "options": s.params["options"][:3]}) if s.params.get("options") else s
                 for s in steps]  # fmt: skip
        rules.append(rule.model_copy(update={"steps": tuple(steps)}))
    fewer = {"rules": tuple(rules), "prune": None, "distill": None, "report": None}  # stages: see test_chain.py
    if found.training is not None:
        few = {"steps": 3, "batch": 4, "images": 4, "sample_steps": 2}
        return found.model_copy(update={**fewer, "training": found.training.model_copy(update=few)})
    return found.model_copy(update=fewer)


@pytest.mark.parametrize("name", NAMES)
def test_smoothing_with_folds_changes_nothing_when_rounding_is_fine(name: str) -> None:
    """Eight bits on a smooth recipe against eight bits without: both near the original, and folds really happened."""
    family = families.get(name)
    model = family.tiny()
    text = {
        "name": "smooth8",
        "calibration": {"samples": 2, "steps": 2},
        "rules": [
            {
                "weight": {"format": "int", "bits": 8, "scale": "float32"},
                "smooth": "fold",
                "steps": [{"smooth": {}}, "rtn"],
            }
        ],
    }
    result = api.quantize(model, recipe.parse_recipe(text, "test"))
    kinds = {r.smooth for r in result.records}
    assert "fold" in kinds and "online" in kinds
    before, after = forward(family, model), forward(family, result.model)
    assert float((after - before).norm() / before.norm()) < 0.05


def test_an_interrupted_run_goes_on_and_gives_the_same_tensors(tmp_path: Any) -> None:
    family = families.get("dit")
    model = family.tiny()
    source, layout = ModuleSource(model), family.layout(model)
    plan = recipe.make_plan(recipe.load_recipe("w4a16-rtn"), layout)
    whole = Memory()
    engine.run(source, layout, plan, {}, RecipeSteps(), whole)

    class Stops(RecipeSteps):
        calls = 0

        def encode(self, *args: Any) -> Any:
            Stops.calls += 1
            if Stops.calls == 12:
                raise KeyboardInterrupt
            return super().encode(*args)

    with pytest.raises(KeyboardInterrupt):
        engine.run(source, layout, plan, {}, Stops(), Memory(), journal=tmp_path)
    assert (tmp_path / "unit-00000.safetensors").exists()
    resumed = Memory()
    Stops.calls = 100
    outcome = engine.run(source, layout, plan, {}, Stops(), resumed, journal=tmp_path)
    assert Stops.calls < 100 + 18  # the first block was not done again
    assert list(resumed.tensors) == list(whole.tensors) and len(outcome.records) == 18
    assert all(torch.equal(resumed.tensors[n], t) for n, t in whole.tensors.items())


class Counts(RecipeSteps):
    """How many linears were encoded together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def encode_many(self, linears: Any) -> Any:
        self.sizes.append(len(linears))
        return super().encode_many(linears)


def together(recipe_name: str = "w4a16") -> tuple[ModuleSource, Any, Any, dict[str, Any]]:
    """A model of five blocks, its plan, and inputs with Gram matrices of their own."""
    model = deep("dit")
    source, layout = ModuleSource(model), families.get("dit").layout(model)
    inputs: dict[str, Any] = {}
    for number, site in enumerate(layout.sites):
        tokens = torch.randn(200, site.in_features, generator=torch.Generator().manual_seed(number))
        inputs[site.input_key] = SimpleNamespace(gram=tokens.T @ tokens)
    return source, layout, recipe.make_plan(quick(recipe_name), layout), inputs


def test_blocks_that_are_taken_together_come_out_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source, layout, plan, inputs = together()
    found = []
    for room in (engine.WINDOW, 0):
        monkeypatch.setattr(engine, "WINDOW", room)
        steps, sink = Counts(), Memory()
        outcome = engine.run(source, layout, plan, inputs, steps, sink)
        found.append((sink.tensors, steps.sizes, outcome))
    (wide, many, first), (narrow, few, second) = found
    assert max(many) >= 5 * max(few) and sum(many) == sum(few) == len(first.records)
    assert list(wide) == list(narrow) and first.schemes == second.schemes
    assert [r.site for r in first.records] == [r.site for r in second.records]
    for name, tensor in wide.items():
        assert torch.allclose(tensor.double(), narrow[name].double(), rtol=1e-3), name


def test_what_is_encoded_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    source, layout, plan, inputs = together()
    monkeypatch.setattr(engine, "BATCH", 0)
    steps = Counts()
    engine.run(source, layout, plan, inputs, steps, Memory())
    assert set(steps.sizes) == {1}


def test_a_window_that_was_interrupted_is_done_again_with_the_same_bytes(tmp_path: Path) -> None:
    source, layout, plan, inputs = together()
    whole, again = Memory(), Memory()
    engine.run(source, layout, plan, inputs, RecipeSteps(), whole, journal=tmp_path)
    (tmp_path / "unit-00003.safetensors").unlink()
    steps = Counts()
    engine.run(source, layout, plan, inputs, steps, again, journal=tmp_path)
    assert steps.sizes  # the blocks, not what stands outside of them
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert (tmp_path / "unit-00003.safetensors").exists()


def test_static_activations_use_the_calibrated_range() -> None:
    family = families.get("dit")
    model = family.tiny()
    text = {
        "name": "static",
        "calibration": {"samples": 2, "steps": 2},
        "rules": [
            {"weight": {"format": "int"}, "activation": {"mode": "static", "symmetric": False}, "steps": ["rtn"]}
        ],
    }
    result = api.quantize(model, recipe.parse_recipe(text, "test"))
    layer = result.model.transformer_blocks[0].attn1.to_q
    assert layer.input_scale > 0 and 0 <= layer.input_zero <= 255
    before, after = forward(family, model), forward(family, result.model)
    assert float((after - before).norm() / before.norm()) < 0.3


def test_rules_first_match_wins_and_embedders_are_left_alone() -> None:
    family = families.get("dit")
    model = family.tiny()
    layout = family.layout(model)
    text = {
        "name": "x",
        "rules": [
            {"blocks": "0", "roles": ["qkv"], "keep": True},
            {"names": ["*.ff.net.2"], "weight": {"format": "int", "bits": 6}},
            {"weight": {"format": "int", "bits": 4}},
        ],
    }
    plan = recipe.make_plan(recipe.parse_recipe(text, "x"), layout)
    check_plan(plan)
    bits = {d.site: d.weight.params["bits"] for d in plan.layers}
    assert "transformer_blocks.0.attn1.to_q" not in bits and bits["transformer_blocks.1.attn1.to_q"] == 4
    assert bits["transformer_blocks.0.ff.net.2"] == 6
    assert not [name for name in bits if not name.startswith("transformer_blocks.")]


def test_a_scale_that_overflows_is_an_error_with_the_name_of_the_layer() -> None:
    broken = SimpleNamespace(
        packed=SimpleNamespace(tensors={"scale": torch.tensor([float("inf")])}), low_rank=None, extra={}
    )
    with pytest.raises(Exception, match=r"E701.*site.scale"):
        engine._check(engine.stored_tensors("site", broken, None, {}))
