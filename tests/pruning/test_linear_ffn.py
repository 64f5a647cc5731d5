"""Feed-forwards that become one linear: the fit, which of them go, and that the result loads, quantizes and trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ditcompress import api, prune
from ditcompress.errors import DitcompressError
from ditcompress.experts import convertible
from ditcompress.linear_ffn import blank, standing_in
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.pruning import Probe
from ditcompress.pruning.width import Context, cut_axes, linear_ffn, narrowing
from ditcompress.pruning.width.linear_ffn import Params, Sums

from .models import deep, inputs, run, same_everywhere
from .test_width_methods import context

FAMILIES = ["dit", "flux", "pixart", "sd3"]
FEW = ["samples=1", "steps=2", "timesteps=1", "batch=1"]
OPTIONS: dict[str, Any] = {"width_ratio": 0.5, "width_method": "linear-ffn", "width_overrides": FEW}


def straightened(model: nn.Module, *blocks: int) -> nn.Module:
    """The feed-forwards of these blocks without their activation."""
    for number in blocks:
        first = model.get_submodule(f"transformer_blocks.{number}.ff.net.0")
        first.forward = first.get_submodule("proj").forward  # type: ignore[method-assign, assignment]
    return model


def seeing(model: nn.Module, ratio: float) -> Context:
    """A context with more tokens than a feed-forward has inputs."""
    found = context("dit", model, ratio)
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn((12, *found.adapter.latent_shape(model.config)), generator=draw)
    cond = found.adapter.random_conditions(model.config, 12, draw)
    return replace(found, probes=(Probe(0, latents, torch.full((12,), 400), cond, 1.0),))


def feed_forward(model: nn.Module, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W2 W1 and W2 b1 + b2 of a block's feed-forward."""
    path = f"transformer_blocks.{number}.ff.net"
    w1, b1, w2, b2 = (
        model.state_dict()[f"{path}.{leaf}"] for leaf in ("0.proj.weight", "0.proj.bias", "2.weight", "2.bias")
    )
    return w2 @ w1, w2 @ b1 + b2


def test_normal_equations_of_all_batches_give_the_weighted_least_squares_fit() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 5, generator=draw).double(), torch.randn(300, 3, generator=draw).double()
    w = torch.rand(300, 1, generator=draw).double()
    sums = Sums.of(5, 3, torch.device("cpu"))
    for part in range(0, 300, 60):
        sums.add(x[part : part + 60], y[part : part + 60], w[part : part + 60])
    wide = torch.cat([x, torch.ones(300, 1).double()], 1)
    wanted = torch.linalg.lstsq(w.sqrt() * wide, w.sqrt() * y).solution
    assert torch.allclose(sums.solve(1e-12), wanted, atol=1e-9)
    few = Sums.of(5, 3, torch.device("cpu"))
    few.add(x[:2], y[:2])  # fewer tokens than unknowns
    assert bool(few.solve(1e-4).isfinite().all()) and float(few.solve(1e6).norm()) < 1e-4


@pytest.mark.parametrize("weighting", ["output", "none"])
def test_a_linear_feed_forward_is_recovered_and_goes_first_without_error(weighting: Any) -> None:
    model = straightened(deep("dit"), 2)
    found = seeing(model, 0.15)
    axes, params = cut_axes(found.layout, "both"), Params(weighting=weighting, ridge=1e-9)
    made = narrowing(found, linear_ffn, axes, params)
    (path,) = made.linear
    assert path == "transformer_blocks.2.ff" and made.damage is not None and made.damage < 1e-9 and not made.kept
    weight, bias = feed_forward(model, 2)
    torch.testing.assert_close(made.linear[path].weight, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.linear[path].bias, bias, rtol=1e-3, atol=1e-4)
    alone = {name: float(values[0]) for name, values in linear_ffn.scores(found, axes, params).items()}
    assert sorted(alone, key=lambda name: alone[name])[0] == "transformer_blocks.2.ff.neurons"
    assert all(alone[axis.name] == float("inf") for axis in axes if axis.unit == "head")


def test_a_zero_linear_leaves_the_feed_forward_out() -> None:
    model = deep("dit")
    layout = families.get("dit").layout(model)
    path = "transformer_blocks.1.ff"
    zero = blank(model, layout, convertible(model, layout)[path])
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    given = inputs("dit", model)
    with standing_in(model, {path: zero}):
        output = run("dit", model, given)
    nn.init.zeros_(model.get_parameter(f"{path}.net.2.weight"))
    nn.init.zeros_(model.get_parameter(f"{path}.net.2.bias"))
    assert torch.equal(output, run("dit", model, given))


def test_the_others_are_measured_again_beside_those_that_went() -> None:
    model = deep("dit")
    found = seeing(model, 0.5)
    axes = cut_axes(found.layout, "neurons")
    greedy, single = (linear_ffn.linear(found, axes, Params(again=again)) for again in (True, False))
    values = {
        name.removesuffix(".neurons"): float(t[0]) for name, t in linear_ffn.scores(found, axes, Params()).items()
    }
    assert list(single) == sorted(values, key=lambda path: values[path])[: len(single)] and len(greedy) == len(single)
    assert next(iter(greedy)) == next(iter(single))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_the_same_in_memory_in_a_folder_and_for_stock_diffusers(family: str, tmp_path: Path) -> None:
    model, made, loaded = same_everywhere(family, tmp_path, OPTIONS)
    feed_forwards = convertible(model, families.get(family).layout(model))
    whole = {path: sum(p.numel() for p in model.get_submodule(path).parameters()) for path in feed_forwards}
    fits = {path: sum(p.numel() for p in loaded.get_submodule(path).parameters()) for path in feed_forwards}
    gone = sum(whole.values()) - sum(fits.values())
    assert abs(gone - sum(whole.values()) / 2) <= max(whole.values()) / 2
    assert set(made.facts["width"]["linear"]) == {path for path in whole if fits[path] < whole[path]}
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in loaded.parameters()) == gone


def test_blocks_go_too_and_the_result_trains_quantizes_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    original, small = tmp_path / "original", tmp_path / "small"
    deep("dit").save_pretrained(original)  # type: ignore[operator]
    prune(original, 0.2, small, method="magnitude", **OPTIONS)
    trained = api.distill(
        original, small, tmp_path / "trained", steps=2, batch=2, images=2, sample_steps=2, device="cpu"
    )
    assert len(trained.history.losses) == 2
    before, after = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (small, tmp_path / "trained")
    )
    paths = json.loads((small / "config.json").read_text())["quantization_config"]["linear"]
    assert paths and not torch.equal(before[f"{paths[0]}.weight"], after[f"{paths[0]}.weight"])
    api.quantize(tmp_path / "trained", "w8a16", tmp_path / "packed")
    code = (
        "import ditcompress, torch; from diffusers import DiTTransformer2DModel as M\n"
        f"m = M.from_pretrained({str(tmp_path / 'packed')!r}).eval()\n"
        f"print(type(m.get_submodule({paths[0]!r})).__name__)\n"
        "y = m(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.tensor([3]))[0]; print(bool(y.isfinite().all()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["PackedLinear", "True"], done.stderr[-2000:]
    with pytest.raises(DitcompressError, match="E205"):
        api.export(small, tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width_ratio": 0.99}, r"E203 bad-option\]: --width-ratio 0.99: linears save at most 0\.8"),
        ({"width_units": "heads"}, "E205"),
        ({"width_overrides": ["ridge=0"]}, "E203"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DitcompressError, match=message):
        prune(deep("dit"), **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with linear feed-forwards."""
    folder = tmp_path_factory.mktemp("linear")
    deep("dit").save_pretrained(folder / "original")  # type: ignore[operator]
    made = prune(folder / "original", out=folder / "pruned", **OPTIONS)
    assert made.facts == prune(folder / "original", dry_run=True, **OPTIONS).facts
    return folder / "pruned"


@pytest.mark.parametrize("how", ["nowhere", "twice", "block", "missing", "number"])
def test_a_damaged_entry_is_refused_by_both_doors(how: str, pruned: Path, tmp_path: Path) -> None:
    model, out = deep("dit"), tmp_path / "linear"
    shutil.copytree(pruned, out)
    config = json.loads((out / "config.json").read_text())
    listed = config["quantization_config"]["linear"]
    if how == "missing":
        weights = out / "diffusion_pytorch_model.safetensors"
        save_file({n: t for n, t in load_file(weights).items() if n != f"{listed[0]}.weight"}, weights)
    else:
        listed.append({"nowhere": "nowhere", "twice": listed[0], "block": "transformer_blocks.0", "number": 3}[how])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DitcompressError, match="E315" if how == "missing" else "E320"):
        load_model(out)
    with pytest.raises(DitcompressError, match="E315" if how == "missing" else "E320"):
        type(model).from_pretrained(out)  # type: ignore[attr-defined]
