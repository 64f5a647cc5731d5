"""ViDiT-Q: channel balance, and mixed precision by the metric of each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditcompress import api, recipe
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.trajectory import Sampling
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.errors import DitcompressError
from ditcompress.hadamard import block_for, rotate, signs
from ditcompress.models import registry as families
from ditcompress.plan import LayerDecision, StepSpec, WeightSpec
from ditcompress.quantization import vidit_mp
from ditcompress.quantization._runner import Runner, replaced
from ditcompress.quantization.smooth import factors


def runner(name: str) -> tuple[Any, Runner]:
    family = families.get(name)
    model = family.tiny()
    source = ModuleSource(model)
    conditions = get_conditions(source, family, 4, 0)
    scheduler = family.default_scheduler(source.config)
    return model, Runner(model, family, source.config, scheduler, conditions, Sampling(2, 2.0, 0), images=4)


def test_incoherence_falls_with_scaling_and_again_with_rotation() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 128, generator=draw) * torch.exp(torch.randn(128, generator=draw))
    x[:, 5] *= 40
    s = factors(x.abs().amax(0), torch.ones(128), 0.75)
    sign = signs(128, 0)
    rotated = rotate(x / s, sign, block_for(128, 0))

    def incoherence(values: torch.Tensor) -> float:
        channels = values.abs().amax(0)
        return float(channels.max() / channels.mean())

    assert incoherence(rotated) < incoherence(x / s) < incoherence(x)


def test_a_unit_that_is_not_changed_has_no_effect_and_the_model_is_put_back() -> None:
    model, run = runner("dit")
    site = next(n for n, m in model.named_modules() if n.endswith("attn1.to_q"))
    before = model.get_submodule(site).weight.detach().clone()
    assert set(run.effects({}).values()) == {0.0}
    some = run.effects({site: before + 0.1 * torch.randn_like(before)})
    assert some["quality"] > 0 and some["text"] > 0
    with pytest.raises(RuntimeError), replaced(model, {site: torch.zeros_like(before)}):
        raise RuntimeError
    assert torch.equal(model.get_submodule(site).weight, before)


def test_groups_are_those_of_the_paper() -> None:
    spec = WeightSpec("int", {"bits": 4})

    def group(site: str, role: str) -> str:
        return vidit_mp.group_of(LayerDecision(site, role, spec))

    assert group("transformer_blocks.0.attn1.to_q", "qkv") == "self"
    assert group("transformer_blocks.0.attn2.to_k", "qkv") == "cross"
    assert group("temporal_transformer_blocks.0.attn1.to_q", "qkv") == "temporal"
    assert group("transformer_blocks.0.ff.net.2", "ffn_out") == "ffn"


def test_the_budget_goes_to_the_most_sensitive_for_their_size_and_is_kept() -> None:
    sizes = {"a": 100, "b": 100, "c": 200}
    params = vidit_mp.Params(bits=(4, 6, 8), target_bits=6.0)
    level = vidit_mp.spend({"a": 1.0, "b": 9.0, "c": 4.0}, sizes, params)
    assert level["b"] >= level["c"] >= level["a"]
    assert sum(params.bits[level[u]] * n for u, n in sizes.items()) <= 6.0 * 400
    with pytest.raises(DitcompressError, match=r"E202.*the nearest is 4"):
        vidit_mp.spend({"a": 1.0}, {"a": 1}, vidit_mp.Params(target_bits=3.0))


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_the_plan_has_the_declared_mean_and_is_the_same_again(name: str) -> None:
    model = families.get(name).tiny()
    chosen = recipe.load_recipe("vidit-q-mp", ["calibration.samples=4", "calibration.steps=2"])
    plans = [api.quantize(model, chosen).plan for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    sizes = {d.site: model.get_submodule(d.site).weight.numel() for d in plans[0].layers}
    mean = sum(d.weight.params["bits"] * sizes[d.site] for d in plans[0].layers) / sum(sizes.values())
    assert 5 < mean <= 6 and {s.name for d in plans[0].layers for s in d.steps} >= {StepSpec("vidit_mp").name}
