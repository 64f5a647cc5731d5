"""What a routed model refuses, and what may not go wrong silently."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ditcompress import api, mixture
from ditcompress.cli.app import app
from ditcompress.errors import DitcompressError
from ditcompress.experts import convertible
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.routed import RoutedPart, apply_routed
from tests.moe.test_command import FEW, predicted
from tests.moe.test_layer import layer

METHODS = [name.replace("_", "-") for name in mixture.registry.names()]


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_and_layers_of_every_method_are_told_before_anything_runs(method: str, tiny_dit: Path) -> None:
    facts = api.moe(tiny_dit, method=method, dry_run=True)
    assert facts["layers"] and not facts["written"]
    flops = facts["block_linear_flops_per_token"]
    assert flops["active"] < flops["dense"] or method == "switch-dit"
    done = CliRunner().invoke(app, ["moe", str(tiny_dit), "--method", method, "--dry-run"])
    assert done.exit_code == 0 and "nothing was written" in done.output


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_the_parts_that_a_method_routes_is_refused(method: str, tmp_path: Path) -> None:
    families.get("generic").tiny().save_pretrained(tmp_path / "sana")  # its feed-forwards are convolutions
    with pytest.raises(DitcompressError) as caught:
        api.moe(tmp_path / "sana", method=method, dry_run=True)
    assert caught.value.code == "E205" and len(caught.value.line().splitlines()) == 1


@pytest.mark.parametrize("numbers", [(7, 1, 2), (255, 1, 2), (512, 1, 2)])
def test_experts_that_do_not_divide_the_neurons_are_told_a_number_that_does(numbers: tuple[int, int, int]) -> None:
    model = families.get("dit").tiny()
    layout = families.get("dit").layout(model)
    with pytest.raises(DitcompressError) as caught:
        mixture.specs_for(model, layout, *numbers)
    assert caught.value.code == "E203" and f"--experts {numbers[0]}" in caught.value.line()
    nearest = int(caught.value.remedy.rpartition(" ")[2])
    assert mixture.specs_for(model, layout, nearest, *numbers[1:])


def test_a_router_that_comes_out_as_nan_is_refused_at_conversion() -> None:
    model = families.get("dit").tiny()
    layout = families.get("dit").layout(model)
    axes, module = convertible(model, layout), mixture.method_of("dense2moe")
    tokens = {path: torch.full((8, 64), torch.nan) for path in axes}
    scores = {path: torch.rand(256) for path in axes}
    with pytest.raises(DitcompressError) as caught:
        mixture.convert(
            model, layout, mixture.specs_for(model, layout, 8, 1, 2), module, module.Params(), tokens, scores
        )
    assert caught.value.code == "E701" and "transformer_blocks.0.ff" in caught.value.line()


@pytest.fixture(scope="module")
def mixed(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe") / "mixed"
    api.moe(tiny_dit, out, method="uoe", overrides=FEW)
    return out


@pytest.mark.parametrize("name", ["ff.router.weight", "ff.router.bias", "attn1.head_router.router.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_in_a_stored_router_is_refused_by_both_doors(
    name: str, value: float, mixed: Path, tmp_path: Path
) -> None:
    shutil.copytree(mixed, tmp_path / "m")
    file = tmp_path / "m/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[f"transformer_blocks.1.{name}"].view(-1)[3] = value
    save_file(tensors, file)
    for door in (load_model, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(DitcompressError) as caught:
            door(tmp_path / "m")
        assert caught.value.code == "E319" and f"transformer_blocks.1.{name}" in caught.value.line()


def test_a_missing_or_foreign_tensor_of_a_routed_attention_is_refused_by_both_doors(
    mixed: Path, tmp_path: Path
) -> None:
    name = "transformer_blocks.1.attn1.head_router.router.weight"
    for code, change in (("E315", {name: None}), ("E316", {name.replace("weight", "more"): torch.ones(2)})):
        shutil.copytree(mixed, tmp_path / code)
        file = tmp_path / code / "diffusion_pytorch_model.safetensors"
        tensors = {**load_file(file), **change}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
        for door in (load_model, DiTTransformer2DModel.from_pretrained):
            with pytest.raises(DitcompressError) as caught:
                door(tmp_path / code)
            assert caught.value.code == code


def test_entries_that_fit_no_attention_are_refused(tiny_dit: Path) -> None:
    path = "transformer_blocks.0.attn1"
    for part in (
        RoutedPart(kind="groups", count=3, active=1),
        RoutedPart(kind="heads", count=3, active=1, shared=[0, 1]),
        RoutedPart(kind="heads", count=3, active=1, shared=[9]),
    ):
        with pytest.raises(DitcompressError) as caught:
            apply_routed(families.get("dit").tiny(), {path: part})
        assert caught.value.code == "E320" and "4 heads" in caught.value.line()


def test_single_blocks_of_flux_and_fused_projections_have_no_heads_to_route() -> None:
    model = families.get("flux").tiny()
    layout, method = families.get("flux").layout(model), mixture.method_of("moh")
    numbers, params = mixture.Numbers(None, None, None), method.Params()
    assert list(method.routed(model, layout, numbers, params, {})) == ["transformer_blocks.0.attn"]
    model.transformer_blocks[0].attn.fused_projections = True  # type: ignore[union-attr]
    with pytest.raises(DitcompressError) as caught:
        method.routed(model, layout, numbers, params, {})
    assert caught.value.code == "E205"


def test_a_token_of_zeros_and_an_empty_batch_are_routed_like_any_other() -> None:
    for choice in ("token", "expert"):
        moe = layer(2)
        moe.choice = choice  # type: ignore[assignment]
        x = torch.zeros(1, 4, 16, dtype=torch.float64)
        assert bool(moe(x).isfinite().all()) and torch.allclose(moe(x), moe.reference(x))
        assert moe(x[:0]).shape == (0, 4, 16)


def test_more_experts_than_config_says_active_may_be_set_up_to_all(mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    entry = config["quantization_config"]["experts"]["transformer_blocks.0.ff"]
    spec = mixture._convert.ExpertLayer.from_json(entry, "x")
    assert dataclasses.asdict(spec) == entry
    config["quantization_config"]["routed"]["transformer_blocks.0.attn1"]["active"] = 5
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(DitcompressError) as caught:
        load_model(tmp_path / "m")
    assert caught.value.code == "E320"


@pytest.mark.parametrize("method", ["moh", "uoe"])
def test_every_linear_of_a_routed_model_is_calibrated_and_quantized(
    method: str, tiny_dit: Path, tmp_path: Path
) -> None:
    few = ("calibration.samples=2", "calibration.steps=2")
    api.moe(tiny_dit, tmp_path / "m", method=method, overrides=(*FEW, "group=2"), blocks_active=0.5)
    state = load_file(tmp_path / "m/diffusion_pytorch_model.safetensors")
    state["transformer_blocks.0.block_router.router.bias"][1] = -1e6  # the second block never runs
    save_file(state, tmp_path / "m/diffusion_pytorch_model.safetensors")
    result = api.quantize(tmp_path / "m", "w4a8", tmp_path / "q", overrides=few)
    assert {record.site for record in result.records} >= {
        f"transformer_blocks.{n}.attn1.{part}" for n in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    a, b = predicted(tmp_path / "m"), predicted(tmp_path / "q")
    assert (a - b).norm() < 0.5 * a.norm()
