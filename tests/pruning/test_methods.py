"""Every registered method gives a valid selection, the same for the same seed; what each of them measures is right."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditcompress import api, prune
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.models import depth_of, registry
from ditcompress.pruning import Context, Probe, choose, method
from ditcompress.pruning import registry as methods
from ditcompress.pruning._knapsack import lightest
from ditcompress.pruning._streams import watched
from ditcompress.pruning.shortgpt import influence
from ditcompress.pruning.taylor import changes

from .models import DEPTHS, deep, inputs, run

METHODS = methods.names()
FEW = {
    "samples": 2,
    "steps": 3,
    "timesteps": 2,
    "batch": 2,
    "updates": 2,
    "rows": 2,
    "images": 2,
    "divisions": 2,
    "rounds": 2,
}


def few(name: str) -> list[str]:
    known = method(name, {})[1].model_dump()
    return [f"{key}={value}" for key, value in FEW.items() if key in known]


def context(name: str, model: nn.Module, target: float = 0.5) -> Context:
    """A context with one probe of two images."""
    family, config, given = registry.get(name), dict(model.config), inputs(name, model)  # type: ignore[arg-type]
    layout = family.layout(model)
    depth = depth_of(config, layout)
    costs = {unit.name: float(len(unit.blocks)) for unit in depth.units}
    probe = Probe(0, given["latents"], torch.tensor([400, 400]), given["cond"], 1.0)
    return Context(model, family, layout, depth, costs, target * len(layout.blocks), (probe,))


@pytest.mark.parametrize("family", sorted(DEPTHS))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_valid_selection_for_every_family(name: str, family: str) -> None:
    model = deep(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    coarse = {"overrides": few(name), "width_overrides": ["rounds=2", "samples=2", "steps=3"]}
    first, second = (prune(model, 0.4, method=name, seed=3, **coarse) for _ in range(2))
    assert first.facts == second.facts
    removed, total = set(first.facts["removed"]), registry.get(family).layout(model).blocks
    assert (removed or first.facts["width"]) and removed < set(total) and not removed & set(first.facts["fixed"])
    assert 0.2 < first.facts["saved"] < 0.6
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert first.model is not None
    output = run(family, first.model, inputs(family, model))
    assert bool(output.isfinite().all()) and len(first.facts["kept"]) == len(total) - len(removed)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_removes_half_of_the_digits_model(name: str) -> None:
    facts = api.prune(digits_folder(), 0.5, method=name, overrides=few(name), dry_run=True).facts
    assert len(facts["removed"]) == 6 or facts["width"]  # of a method that divides the budget
    assert "transformer_blocks.0" not in facts["removed"]
    assert facts["saved"] == pytest.approx(0.5)
    assert set(facts["scores"]) == {f"transformer_blocks.{i}" for i in range(1, 12)}


def test_random_depends_on_the_seed() -> None:
    found = {tuple(prune(deep("dit"), 0.5, method="random", seed=s).facts["removed"]) for s in range(8)}
    assert len(found) > 1


def silenced(model: nn.Module, block: str) -> nn.Module:
    """A copy whose `block` (of a DiT) adds nothing: both gates are zero."""
    model = copy.deepcopy(model)
    linear = model.get_submodule(f"{block}.norm1.linear")
    dim = linear.out_features // 6  # type: ignore[operator]
    with torch.no_grad():
        for chunk in (2, 5):
            linear.weight[chunk * dim : (chunk + 1) * dim] = 0  # type: ignore[index]
            linear.bias[chunk * dim : (chunk + 1) * dim] = 0  # type: ignore[index]
    return model


@pytest.mark.parametrize("name", ["shortgpt", "flux_lite", "taylor", "laptop_diff", "oracle_greedy"])
def test_a_block_that_adds_nothing_scores_nothing_and_goes_first(name: str) -> None:
    model = silenced(deep("dit"), "transformer_blocks.2")
    found = context("dit", model, 0.2)
    module, params = method(name, {})
    choice = choose(found, module, params, 5.0)
    assert choice.units == ("transformer_blocks.2",)
    assert choice.scores.values["transformer_blocks.2"] == pytest.approx(0, abs=1e-7)
    assert choice.damage == 0.0


def test_block_influence_is_that_of_stored_tensors_and_does_not_see_a_common_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    expected = (
        1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.view(-1, 7), y.view(-1, 7), strict=True)) / 10
    )
    assert influence([(x, y)]) == pytest.approx(expected, rel=1e-5)
    assert influence([(8 * x, 8 * y)]) == pytest.approx(expected, rel=1e-5)
    assert influence([(x, -x)]) == pytest.approx(2, abs=1e-6)
    assert influence([(x, -x)], angular=True) == pytest.approx(1, abs=1e-3)
    assert influence([(x, x * float("nan"))]) == 0.5
    assert influence([]) == 0.5


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_streams_of_two_stream_blocks_are_told_apart(family: str) -> None:
    model, seen = deep(family), {}
    blocks = registry.get(family).layout(model).blocks

    def see(name: str, pairs: Any) -> None:
        seen[name] = pairs

    with watched(model, blocks, see):
        run(family, model, inputs(family, model))
    two = [name for name in blocks if not (family == "sd3" and name == blocks[-1])]
    assert all(len(seen[name]) == 2 for name in two)
    assert all(x.shape == y.shape for pairs in seen.values() for x, y in pairs)


def test_taylor_is_the_derivative_by_a_gate_on_the_update() -> None:
    model = deep("dit").double()
    found = context("dit", model)
    probe = Probe(0, found.probes[0].latents.double(), found.probes[0].timestep, found.probes[0].cond, 1.0)
    block = "transformer_blocks.3"
    predict = found.adapter.predict
    direction = torch.randn(2, found.references()[0][0].numel(), generator=torch.Generator().manual_seed(9))

    def projected(gate: float) -> torch.Tensor:
        part = model.get_submodule(block)
        handle = part.register_forward_hook(lambda m, args, output: args[0] + gate * (output - args[0]))
        with torch.no_grad():
            y = predict(model, probe.latents, probe.timestep, probe.cond).flatten(1)
        handle.remove()
        return (direction.double() * y).sum(1)

    with torch.no_grad():
        norm = predict(model, probe.latents, probe.timestep, probe.cond).flatten(1).norm(dim=1)
    slope = (projected(1 + 1e-4) - projected(1 - 1e-4)) / 2e-4 / norm
    measured = changes(found, probe, (block,), torch.Generator().manual_seed(9))[block]
    assert measured == pytest.approx(float(slope.square().sum()), rel=1e-3)


def test_the_knapsack_is_the_best_of_all_subsets() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.rand(8, generator=generator).tolist()
        weights = torch.randint(1, 6, (8,), generator=generator).tolist()
        least = sum(weights) * 0.45
        sets = [s for n in range(9) for s in combinations(range(8), n) if sum(weights[i] for i in s) >= least]
        best = min(sum(values[i] for i in s) for s in sets)
        found = lightest(values, weights, least, bins=sum(weights))
        assert sum(weights[i] for i in found) >= least
        assert sum(values[i] for i in found) == pytest.approx(best)
    assert lightest([3.0, 1.0, 2.0], [5.0, 5.0, 5.0], 10.0) == [1, 2]
    assert lightest([1.0], [1.0], 0.0) == []


def test_every_greedy_removal_is_the_best_of_all_that_are_left() -> None:
    found = context("dit", deep("dit"), 0.6)
    module, params = method("oracle_greedy", {})
    choice = choose(found, module, params, 5.0)
    removed: list[str] = []
    for name in choice.units:
        trials = {other: found.damage([*removed, other]) for other in found.names if other not in removed}
        assert name == min(trials, key=lambda other: trials[other])
        removed.append(name)
    assert len(removed) == 3 and choice.damage == pytest.approx(found.damage(removed))


@pytest.mark.parametrize("by", ["params", "flops", "latency"])
def test_the_ratio_counts_parameters_operations_or_time(by: str) -> None:
    facts = prune(deep("flux"), 0.4, by=by, method="random").facts
    assert 0.2 < facts["saved"] < 0.6
    if by == "params":
        model = deep("flux")
        sizes = {b: sum(p.numel() for p in model.get_submodule(b).parameters())
                 for b in registry.get("flux").layout(model).blocks}  # fmt: skip
        assert facts["saved"] == pytest.approx(sum(sizes[b] for b in facts["removed"]) / sum(sizes.values()))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(DitcompressError, match=r"E203 bad-option.*--ratio.*not between 0 and 1"):
        prune(digits_folder(), ratio, dry_run=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.99}, r"E203 bad-option\]: --ratio 0.99: leaves no block; at most 0.917 can go"),
        (
            {"method": "shortgtp"},
            r"E201 unknown-name\]: pruning method 'shortgtp': is not known; did you mean 'shortgpt'",
        ),
        ({"by": "bytes"}, r"E203 bad-option\]: --by bytes: is not known; use params, flops, latency"),
        ({"overrides": ["smples=3"]}, r"E203 bad-option\]: --set smples: .*did you mean 'samples'"),
        ({"overrides": ["samples"]}, r"E203 bad-option\]: --set samples: is not key=value"),
        ({"overrides": ["samples=many"]}, r"E203 bad-option\]: --set samples"),
        ({"overrides": ["samples=0"]}, r"E203 bad-option\]: --set samples"),
        ({"ratio": 0.9, "method": "sana-bi", "overrides": few("sana_bi")}, "E203 bad-option.*cannot be reached"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DitcompressError, match=message) as caught:
        prune(digits_folder(), **{"ratio": 0.5, "method": "shortgpt", "dry_run": True, **arguments})
    assert "\n" not in caught.value.line()


def test_a_class_whose_blocks_are_numbered_is_refused() -> None:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=8,
        approximator_layers=1,
    )  # fmt: skip
    with pytest.raises(DitcompressError, match=r"E205 unsupported.*by block number"):
        prune(model, 0.5, method="magnitude")


def test_a_compressed_model_and_an_existing_folder_are_refused(w4a8: Path, tiny_dit: Path, tmp_path: Path) -> None:
    with pytest.raises(DitcompressError, match="E322"):
        prune(w4a8, 0.5, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    with pytest.raises(DitcompressError, match="E501"):
        prune(tiny_dit, 0.5, tmp_path / "b", method="magnitude")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_sensitivity_lists_every_removable_block_over_timesteps() -> None:
    found = api.sensitivity(digits_folder())
    assert [row["block"] for row in found["blocks"]] == [f"transformer_blocks.{i}" for i in range(1, 12)]
    assert len(found["timesteps"]) == 10 and all(len(row["by_timestep"]) == 10 for row in found["blocks"])
    assert list(found["fixed"]) == ["transformer_blocks.0"]


def test_skipped_steps_lend_their_weight_to_the_nearest_probe() -> None:
    from ditcompress.pruning._probes import gathered, spread

    assert spread(25, 0) == list(range(25)) and spread(5, 3) == [0, 2, 4] and spread(1, 4) == [0]
    assert gathered([1.0, 2.0, 4.0, 8.0, 16.0], [0, 2, 4]) == {0: 3.0, 2: 12.0, 4: 16.0}
