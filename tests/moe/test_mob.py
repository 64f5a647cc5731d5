"""Mixture of Blocks: all blocks on is the dense model, none the identity, samples of a batch skip for themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from typer.testing import CliRunner

from ditcompress import api, mixture
from ditcompress.cli.app import app
from ditcompress.errors import DitcompressError
from ditcompress.experts import build, convertible
from ditcompress.mixture._blocks import block_groups, outside_groups
from ditcompress.models import registry as families
from ditcompress.routed import RoutedPart, apply_routed
from ditcompress.runtime.moe import Router
from tests.moe.routed_models import both, written
from tests.moe.test_command import FEW, predicted
from tests.pruning.models import bypassed, deep, inputs, run

FIRST = "transformer_blocks.0"
KINDS = ("dit", "pixart", "flux", "sd3", "qwen_image")


def grouped(family: str, active: int, first: str = FIRST) -> tuple[nn.Module, nn.Module, Any]:
    """A deep tiny model in float64, its copy with a group of three blocks at `first`, and the group's router."""
    model = deep(family).double()
    other = copy.deepcopy(model)
    (part,) = apply_routed(other, {first: RoutedPart(kind="blocks", count=3, active=active)}).values()
    generator = torch.Generator().manual_seed(0)
    for module in other.modules():
        if isinstance(module, Router):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model, other, part


def forced(part: Any, places: list[int]) -> None:
    """Make every sample choose the blocks at `places`."""
    bias = torch.full((part.count,), -1e6)
    bias[places] = 1e6
    part.router.bias.copy_(bias)
    part.condition.bias.copy_(bias)


@pytest.mark.parametrize("family", KINDS)
def test_all_blocks_on_is_the_dense_model_and_fewer_is_the_model_without_the_others(family: str) -> None:
    model, other, part = grouped(family, 3)
    given = inputs(family, model)
    given["latents"] = given["latents"].double()
    assert torch.equal(run(family, model, given), run(family, other, given))
    part.active = 1
    forced(part, [1])
    gone = bypassed(family, model, [f"transformer_blocks.{n}" for n in (0, 2)])
    assert torch.equal(run(family, gone, given), run(family, other, given))


def test_single_blocks_of_flux_form_groups_of_their_own() -> None:
    model, other, part = grouped("flux", 1, "single_transformer_blocks.0")
    given = inputs("flux", model)
    given["latents"] = given["latents"].double()
    forced(part, [2])
    gone = bypassed("flux", model, [f"single_transformer_blocks.{n}" for n in (0, 1)])
    assert torch.equal(run("flux", gone, given), run("flux", other, given))


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_no_block_is_the_identity_on_all_streams(family: str) -> None:
    model, other, part = grouped(family, 1)
    part.active = 0
    given = inputs(family, model)
    given["latents"] = given["latents"].double()
    gone = bypassed(family, model, [f"transformer_blocks.{n}" for n in range(3)])
    assert torch.equal(run(family, gone, given), run(family, other, given))


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_samples_of_a_batch_choose_for_themselves_and_are_what_they_are_alone(family: str) -> None:
    model, other, part = grouped(family, 1)
    seen: list[Any] = []
    part.seen = seen.append
    times = (3, 900, 400, 700, 20, 550)
    module, generator = families.get(family), torch.Generator().manual_seed(3)
    latents = torch.randn((6, *module.latent_shape(model.config)), generator=generator, dtype=torch.float64)
    cond = module.random_conditions(model.config, 6, generator)
    ran: list[int] = []
    other.get_submodule(f"{FIRST}.ff").register_forward_hook(lambda m, args, y: ran.append(len(args[0])))
    with torch.no_grad():
        together = module.predict(other, latents, torch.tensor(times), cond)
        chosen = seen[0].chosen[:, 0]
        assert len(chosen.unique()) > 1
        assert sum(ran) == int((chosen == 0).sum())  # the block computes the samples that chose it, and no others
        for n in range(6):
            own = {name: tensor[n : n + 1] for name, tensor in cond.items()}
            alone = module.predict(other, latents[n : n + 1], torch.tensor(times[n : n + 1]), own)
            assert torch.allclose(alone, together[n : n + 1], atol=1e-12)
            assert torch.equal(seen[-1].chosen[0], seen[0].chosen[n])


def test_a_copy_routes_with_its_own_blocks() -> None:
    _, other, _ = grouped("dit", 1)
    again = copy.deepcopy(other)
    with torch.no_grad():
        for parameter in again.transformer_blocks.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    a, b = both("dit", other, again)
    assert (a - b).norm() > 1e-3 * a.norm()
    assert torch.equal(both("dit", other, copy.deepcopy(other))[0], a)


def test_gradients_of_the_choice_reach_the_router_and_leave_the_output() -> None:
    _, other, part = grouped("dit", 2)
    module = families.get("dit")
    latents = torch.randn(2, *module.latent_shape(other.config), dtype=torch.float64)
    cond = module.random_conditions(other.config, 2, torch.Generator().manual_seed(0))
    plain = module.predict(other, latents, torch.tensor([3, 900]), cond).detach()
    for router in (part.router, part.condition):
        router.weight.requires_grad_(True)
    y = module.predict(other, latents, torch.tensor([3, 900]), cond)
    assert torch.allclose(y, plain, atol=1e-6)
    y.square().sum().backward()
    assert all(float(r.weight.grad.abs().sum()) > 0 for r in (part.router, part.condition))


@pytest.mark.parametrize("family", KINDS)
def test_groups_hold_about_the_share_that_is_asked_for_and_every_group_keeps_a_block(family: str) -> None:
    model = deep(family)
    layout = families.get(family).layout(model)
    groups = block_groups(model, layout, 0.5, 2, 0.5)
    places = [
        f"{p.rpartition('.')[0]}.{int(p.rpartition('.')[2]) + n}" for p, g in groups.items() for n in range(g.count)
    ]
    assert len(places) == len(set(places)) and set(places) <= set(layout.blocks)
    assert all(1 <= group.active <= group.count for group in groups.values())
    assert not any(getattr(model.get_submodule(place), "context_pre_only", False) for place in places)
    outside = outside_groups(layout, groups)
    assert len(outside) == len(layout.blocks) - sum(g.count - 1 for g in groups.values())


@pytest.mark.parametrize(("share", "code"), [(0.0, "E203"), (1.5, "E203"), (-1, "E203")])
def test_shares_that_do_not_fit_are_refused(share: float, code: str) -> None:
    model = deep("dit")
    with pytest.raises(DitcompressError) as caught:
        block_groups(model, families.get("dit").layout(model), share, 5, 0.5)
    assert caught.value.code == code


def test_blocks_of_unknown_classes_are_refused() -> None:
    model = deep("generic")
    with pytest.raises(DitcompressError) as caught:
        block_groups(model, families.get("generic").layout(model), 0.5, 2, 0.5)
    assert caught.value.code == "E205"


@pytest.fixture(scope="module")
def deep_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deep-dit"
    deep("dit").save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_experts_and_blocks_together_on_disk(deep_dit: Path, tmp_path: Path) -> None:
    facts = written(deep_dit, tmp_path / "m", "dense2moe-mob")
    assert [p for p in facts["layers"] if p.endswith("block_router")] == [f"{FIRST}.block_router"]
    entry = facts["layers"][f"{FIRST}.block_router"]
    assert entry["count"] == 5 and entry["active"] == 3
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "m")
    per_block = sum(p.numel() for p in model.transformer_blocks[1].parameters())
    idle = 5 * sum(p.numel() for p in model.transformer_blocks[1].ff.experts[0].parameters())
    missed = facts["parameters"]["total"] - facts["parameters"]["active"]
    router = sum(p.numel() for p in model.transformer_blocks[0].parameters()) - per_block
    assert missed == round(5 * idle + 0.4 * (5 * (per_block - idle) + router))
    done = written(deep_dit, tmp_path / "t", "dense2moe-mob", "training.learning_rate=0.0003", distill_steps=14)
    assert done["sqnr_db"] > facts["sqnr_db"]
    before, after = (DiTTransformer2DModel.from_pretrained(p).transformer_blocks[2].attn1.to_q.weight
                     for p in (deep_dit, tmp_path / "t"))  # fmt: skip
    assert not torch.equal(before, after)  # the blocks learn too
    api.quantize(tmp_path / "t", "w8a16", tmp_path / "q")
    a, b = predicted(tmp_path / "t"), predicted(tmp_path / "q")
    assert (a - b).norm() < 0.2 * a.norm()


def test_blocks_active_goes_with_any_method_of_feed_forwards(deep_dit: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "out"), "--method", "random", "--blocks-active", "1", "--experts", "4",
               "--active", "3", *[x for value in FEW for x in ("--set", value)]]  # fmt: skip
    done = CliRunner().invoke(app, ["moe", str(deep_dit), *options])
    assert done.exit_code == 0, done.output
    assert torch.allclose(predicted(tmp_path / "out"), predicted(deep_dit), atol=1e-5)  # everything is active


@pytest.mark.parametrize(
    ("path", "change"),
    [(FIRST, {"active": 9}), (FIRST, {"count": 99}), (FIRST, {"kind": "x"}), (FIRST, {"more": 1}),
     (FIRST, {"alpha": 2}), ("transformer_blocks.4", {}), ("nowhere", {})],
)  # fmt: skip
def test_a_damaged_entry_is_refused_by_both_doors(
    path: str, change: dict[str, Any], deep_dit: Path, tmp_path: Path
) -> None:
    from ditcompress.loading import load_model

    folder = tmp_path / "m"
    DiTTransformer2DModel.from_pretrained(deep_dit).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    entry = {**RoutedPart(kind="blocks", count=3, active=2).model_dump(), **change}
    config["quantization_config"] = {"quant_method": "ditcompress", "version": 1, "recipe": "moe", "schemes": {},
                                     "layers": {}, "routed": {path: entry}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for door in (load_model, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(DitcompressError) as caught:
            door(folder)
        assert caught.value.code == "E320"


def test_use_inside_a_group_counts_the_samples_that_ran_the_block() -> None:
    from ditcompress.distill.data import Batch
    from ditcompress.mixture._use import Use

    _, other, _ = grouped("dit", 1)
    layout = families.get("dit").layout(other)
    spec = mixture.specs_for(other, layout, 4, 0, 1)
    axes = convertible(other, layout)
    for path in axes:
        moe = build(other, layout, axes[path], spec[path])
        moe.router.weight.normal_(generator=torch.Generator().manual_seed(1))
        other.set_submodule(path, moe)
    module, generator = families.get("dit"), torch.Generator().manual_seed(3)
    latents = torch.randn((6, *module.latent_shape(other.config)), generator=generator, dtype=torch.float64)
    times = torch.tensor((3, 900, 400, 700, 20, 550))
    cond = module.random_conditions(other.config, 6, generator)
    use = Use(other)
    use.next(Batch(latents, times, cond))
    with torch.no_grad():
        module.predict(other, latents, times, cond)
    use.close()
    ran = use.rows[f"{FIRST}.block_router"][0].bool()  # (samples, blocks)
    assert 0 < int(ran[:, 0].sum()) < 6
    for place in range(3):
        counts = use.rows[f"transformer_blocks.{place}.ff"][0].sum(1)
        assert torch.equal(counts, 16.0 * ran[:, place])  # every token of those, and none of the others
    assert torch.equal(use.rows["transformer_blocks.3.ff"][0].sum(1), torch.full((6,), 16.0).double())
    assert len(use.tables()["timestep"]["values"]) == 6


def test_a_call_leaves_nothing_behind_that_a_copy_could_not_take() -> None:
    _, other, part = grouped("dit", 2)
    part.router.weight.requires_grad_(True)
    module = families.get("dit")
    latents = torch.randn(2, *module.latent_shape(other.config), dtype=torch.float64)
    module.predict(other, latents, torch.tensor([3, 900]), module.random_conditions(other.config, 2, torch.Generator()))
    copy.deepcopy(other)
