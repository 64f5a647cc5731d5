"""Every width method: the contract over all families, and what is special about each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditcompress import api, prune
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.models import depth_of
from ditcompress.models import registry as families
from ditcompress.pruning import Probe
from ditcompress.pruning.width import Context, cut_axes, kept_units, registry
from ditcompress.pruning.width._axes import cost_of, count_of
from ditcompress.pruning.width._refit import augmented
from ditcompress.pruning.width.base import places, silenced
from ditcompress.pruning.width.obs_diff import removal, timestep_weight
from ditcompress.pruning.width.taylor import changes
from ditcompress.pruning.width.udfc import combination
from ditcompress.structure import narrow
from ditcompress.surgeon import refitted

from .models import deep, inputs, run

METHODS = [name for name in registry.names() if not name.startswith("linear_")]  # they narrow nothing
FAMILIES = ["dit", "flux", "pixart", "sd3"]
FEW = {"samples": 1, "steps": 3, "timesteps": 2, "batch": 2, "updates": 2, "images_each": 1, "prompts": 2,
       "sample_steps": 2}  # fmt: skip


def few(name: str) -> list[str]:
    known = registry.get(name).Params.model_fields
    return [f"{key}={value}" for key, value in FEW.items() if key in known]


def context(family: str, model: nn.Module, ratio: float = 0.25) -> Context:
    """A context with one probe of two images."""
    adapter, config, given = families.get(family), dict(model.config), inputs(family, model)  # type: ignore[arg-type]
    config["_class_name"] = type(model).__name__
    layout = adapter.layout(model)
    probe = Probe(0, given["latents"], torch.tensor([400, 400]), given["cond"], 1.0)
    return Context(model, adapter, layout, depth_of(config, layout), {}, 0.0, (probe,), ratio=ratio, config=config)


def params(name: str, **settings: Any) -> Any:
    return registry.get(name).Params(**settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_narrows_every_family_and_leaves_the_model_alone(name: str, family: str) -> None:
    model = deep(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = prune(model, width_ratio=0.25, width_method=name, width_overrides=few(name), seed=3)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert made.model is not None and bool(run(family, made.model, inputs(family, model)).isfinite().all())
    layout = families.get(family).layout(model)
    axes = cut_axes(layout, "both")
    lost = sum(cost_of(layout, axis) * round(0.25 * count_of(axis)) for axis in axes)  # whatever the scope
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in made.model.parameters()) == lost


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_is_what_a_model_in_memory_becomes(name: str, tmp_path: Path) -> None:
    model = deep("dit")
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    options: Any = {"width_ratio": 0.25, "width_method": name, "width_overrides": few(name)}
    made = prune(tmp_path / "original", out=tmp_path / "narrow", **options)
    dry = prune(tmp_path / "original", dry_run=True, **options)
    in_memory = prune(model, **options)
    assert made.facts == dry.facts and made.facts["width"] == in_memory.facts["width"] and in_memory.model is not None
    given = inputs("dit", model)
    loaded = type(model).from_pretrained(tmp_path / "narrow").eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(run("dit", loaded, given), run("dit", in_memory.model, given))
    assert not (tmp_path / ".narrow.work").exists()


def test_width_is_decided_on_the_model_without_its_blocks(tmp_path: Path) -> None:
    model = deep("dit")
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    options: Any = {"method": "magnitude", "width_ratio": 0.25, "width_method": "obs-diff",
                    "width_overrides": few("obs_diff")}  # fmt: skip
    both = prune(tmp_path / "original", 0.4, tmp_path / "both", **options)
    short = prune(model, 0.4, method="magnitude").model
    assert short is not None
    later = prune(short, **{key: value for key, value in options.items() if key != "method"})
    assert later.facts["width"] == both.facts["width"]


@pytest.mark.parametrize("name", ["obs_diff", "taylor", "magnitude", "udfc"])
def test_units_that_nothing_reads_go_first_and_cost_nothing(name: str) -> None:
    model = deep("dit")
    layout = families.get("dit").layout(model)
    idle = {a.name: [1] if a.unit == "head" else list(range(0, a.size, 4)) for a in cut_axes(layout, "both")}
    with torch.no_grad():
        for axis_name, units in idle.items():
            axis = layout.axes[axis_name]
            for module, start, _ in places(layout, axis):
                for unit in units:
                    first = start + unit * axis.unit_size
                    model.get_submodule(module).weight[:, first : first + axis.unit_size] = 0  # type: ignore[index]
            if name in ("magnitude", "udfc"):  # they see the writers too
                for site in [s for s in layout.sites if axis_name in s.writes]:
                    for unit in units:
                        rows = slice(unit * axis.unit_size, (unit + 1) * axis.unit_size)
                        model.get_submodule(site.name).weight[rows] = 0  # type: ignore[index]
    expected = run("dit", model, inputs("dit", model))
    pruned = prune(model, width_ratio=0.25, width_method=name, width_overrides=few(name)).model
    assert pruned is not None
    torch.testing.assert_close(run("dit", pruned, inputs("dit", model)), expected, rtol=1e-3, atol=1e-4)


def test_global_scope_keeps_the_number_of_units_and_one_in_every_axis() -> None:
    model = deep("dit")
    layout = families.get("dit").layout(model)
    axes = [axis for axis in cut_axes(layout, "both") if axis.unit == "head"]
    scores = {axis.name: torch.arange(4.0) + 10 * place for place, axis in enumerate(axes)}
    local, shared = (kept_units(layout, axes, scores, 0.5, scope) for scope in ("local", "global"))  # type: ignore[arg-type]
    assert all(units == [2, 3] for units in local.values())
    sizes = [len(shared.get(axis.name, range(4))) for axis in axes]
    assert sum(sizes) == 2 * len(axes) and sizes == [1, 1, 1, 3, 4] and shared[axes[0].name] == [3]


def test_a_refit_is_exact_where_what_goes_depends_on_what_stays_and_nothing_where_it_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[:, 5] = 2 * x[:, 0] - x[:, 2] + 0.5  # an exact combination, with a mean
    tokens = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    weight = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    new = refitted(weight, tokens.T @ tokens, torch.tensor([0, 1, 2, 3, 4, 6]), 1e-12)
    torch.testing.assert_close(tokens @ new.T, tokens @ weight.T, rtol=1e-6, atol=1e-6)
    alone = refitted(weight[:, :6], torch.eye(6, dtype=torch.float64), torch.tensor([0, 1, 2]), 0.0)
    torch.testing.assert_close(alone[:, :3], weight[:, :3])
    assert bool((alone[:, 3:] == 0).all())


def test_iterated_removal_is_the_error_of_least_squares_one_unit_after_the_other() -> None:
    found = context("dit", deep("dit").double())
    axis = found.layout.axes["transformer_blocks.1.attn1.heads"]
    reader = "transformer_blocks.1.attn1.to_out.0"
    draw = torch.randn(500, 65, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw[:, 64] = 1
    gram = draw.T @ draw
    scores = removal(found, axis, {reader: gram}, 0.0, 1)
    weight = augmented(found.model.get_submodule(reader))

    def lost(units: list[int]) -> float:
        stay = torch.tensor([c for c in range(65) if c // 16 not in units])
        error = weight - refitted(weight, gram, stay, 0.0)
        return float((error @ gram * error).sum())

    gone: list[int] = []
    for unit in torch.argsort(scores)[:3].tolist():
        trials = {other: lost([*gone, other]) - lost(gone) for other in range(4) if other not in gone}
        assert unit == min(trials, key=lambda other: trials[other])
        assert float(scores[unit]) == pytest.approx(trials[unit], rel=1e-6)
        gone.append(unit)
    assert torch.isinf(scores).sum() == 1


def test_the_timestep_weights_fall_from_the_noisiest_step() -> None:
    weights = [timestep_weight(step, 25) for step in range(25)]
    assert weights[0] == pytest.approx(1.2) and weights[-1] == pytest.approx(0.8) and weights == sorted(weights)[::-1]
    assert timestep_weight(0, 1) == pytest.approx(1.2)


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_taylor_is_the_derivative_by_a_gate_on_the_unit(family: str) -> None:
    found = context(family, deep(family))
    axis = found.layout.axes["transformer_blocks.1." + ("attn1.heads" if family == "dit" else "attn.heads")]
    probe = found.probes[0]
    measured = changes(found, probe, [axis], torch.Generator().manual_seed(5))[axis.name]
    assert measured.shape == (2, 4)

    def projected(gate: float) -> Tensor:
        scale = torch.ones(4)
        scale[2] = gate
        names = {name: start for name, start, _ in places(found.layout, axis)}
        hooks = [
            found.model.get_submodule(name).register_forward_pre_hook(
                lambda m, args: (args[0] * scale.repeat_interleave(16),)
            )
            for name in names
        ]
        with torch.no_grad():
            y = found.predict(probe).flatten(1)
        for hook in hooks:
            hook.remove()
        return y

    whole = projected(1.0)
    direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(5))
    slope = (direction * (projected(1.02) - projected(0.98)) / 0.04 / whole.norm(dim=1, keepdim=True)).sum(1)
    torch.testing.assert_close(measured[:, 2], -slope.double(), rtol=2e-2, atol=1e-4)


def test_udfc_is_exact_for_copies_and_nothing_for_orthogonal_channels() -> None:
    rows = torch.eye(6, dtype=torch.float64)
    rows[5] = 3 * rows[0] - rows[1]
    stay, gone = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])
    mix = combination(rows, stay, gone, 1e-9)
    expected = torch.tensor([[0.0, 0, 0, 0], [3, -1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mix, expected, rtol=1e-6, atol=1e-6)


def test_what_was_rewritten_without_data_can_be_quantized(tmp_path: Path) -> None:
    prune(digits_folder(), out=tmp_path / "narrow", width_ratio=0.3, width_method="udfc")
    result = api.quantize(tmp_path / "narrow", "w8a16", tmp_path / "packed")
    assert result.path is not None and result.bits < 10


def test_the_own_figure_is_that_of_the_narrow_model() -> None:
    found = context("dit", deep("dit"))
    kept = {"transformer_blocks.1.ff.neurons": list(range(0, 256, 2))}
    tensors = {"transformer_blocks.1.ff.net.2.bias": torch.ones(64)}
    whole, narrowed = found.references()[0], copy.deepcopy(found.model)
    with torch.no_grad():
        narrowed.get_submodule("transformer_blocks.1.ff.net.2").bias.copy_(tensors[next(iter(tensors))])  # type: ignore[operator, union-attr]
    narrow(narrowed, found.layout, kept)
    change = run("dit", narrowed, inputs("dit", found.model)) - whole
    expected = float(change.square().sum() / whole.square().sum())
    assert found.damage((), silenced(found, kept, tensors)) == pytest.approx(expected, rel=1e-4)
    assert found.damage((), silenced(found, {}, {})) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width_method": "taylr"}, r"E201 unknown-name\]: width method 'taylr': is not known; did you mean 'taylor'"),
        ({"width_overrides": ["smples=3"]}, r"E203 bad-option\]: --width-set smples: .*did you mean 'samples'"),
        ({"width_overrides": ["samples"]}, r"E203 bad-option\]: --width-set samples: is not key=value"),
        ({"width_overrides": ["scope=some"]}, r"E203 bad-option\]: --width-set scope"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"width_ratio": 0.5, "width_method": "taylor", "dry_run": True, **arguments}
    with pytest.raises(DitcompressError, match=message) as caught:
        prune(digits_folder(), **options)
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize("name", ["obs-diff", "taylor"])
def test_inputs_that_overflow_are_one_clear_line(name: str) -> None:
    model = deep("dit")
    model.get_submodule("transformer_blocks.1.ff.net.0.proj").weight.data.fill_(1e30)
    few = ["samples=2", "steps=2"]
    with pytest.raises(DitcompressError, match="E701 numerical"):
        prune(model, width_ratio=0.5, width_method=name, width_overrides=few)


def test_methods_can_be_explained() -> None:
    assert set(api.explain("width methods")["names"]) == set(registry.names())
    assert "scope" in api.explain("obs-diff")["parameters"]
