"""Qwen-Image by the command line: every way to experts, then quantized, then loaded by plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from typer.testing import CliRunner

from ditcompress.cli.app import app
from ditcompress.loading import load_model
from ditcompress.models import qwen_image
from ditcompress.runtime.linear import PackedLinear
from ditcompress.runtime.moe import routed_parts

FEW = ("calibration.samples=2", "calibration.steps=2", "calibration.reservoir=256", "probe=1", "training.images=2",
       "training.sample_steps=2", "training.batch=2", "scoring=1", "images=0")  # fmt: skip
WAYS = {
    "moh": ("--distill-steps", "1"),
    "moe-best": (),
    "moe-local": ("--experts", "2", "--set", "method.states=4", "--set", "method.tokens=256"),
    "dense2moe": ("--distill-steps", "1", "--blocks-active", "0.5", "--set", "group=2"),
}


def run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, done.output


def given() -> dict[str, torch.Tensor]:
    """Two samples, of which the second has three words of padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 48, generator=generator),
        "encoder_hidden_states_mask": torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),
        "timestep": torch.tensor([0.3, 0.9]),
    }


def predicted(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given(), img_shapes=[[(1, 4, 4)]] * 2, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "dense"
    qwen_image.tiny().save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_every_way_is_converted_quantized_and_loaded(dense: Path, tmp_path: Path) -> None:
    folders = []
    sets = [part for value in FEW for part in ("--set", value)]
    for way, more in WAYS.items():
        run("moe", dense, "--method", way, *more, *sets, "--out", tmp_path / way)
        facts = json.loads((tmp_path / way / "moe.json").read_text())
        flops = facts["block_linear_flops_per_token"]
        assert flops["active"] < flops["dense"] and facts["left_dense"] == []
        run("quantize", tmp_path / way, "--recipe", "w4a16-rtn", "--out", tmp_path / f"{way}-4")
        folders += [tmp_path / way, tmp_path / f"{way}-4"]
        model = load_model(folders[-1])[0]
        assert routed_parts(model) and any(isinstance(m, PackedLinear) for m in model.modules())
    original = predicted(load_model(dense)[0])
    for folder in folders:
        found, theirs = (
            predicted(m) for m in (load_model(folder)[0], QwenImageTransformer2DModel.from_pretrained(folder))
        )
        assert torch.allclose(found, theirs, atol=1e-5)
        assert (found - original).norm() > 1e-3 * original.norm()


def test_weights_that_the_output_does_not_depend_on_are_rounded_too(dense: Path, tmp_path: Path) -> None:
    """The text of the last block: its token weights are all zero."""
    few = [part for value in FEW[:2] for part in ("--set", value)]
    run("quantize", dense, "--recipe", "w8a8", *few, "--out", tmp_path / "w8a8")
    model = QwenImageTransformer2DModel.from_pretrained(tmp_path / "w8a8")
    assert isinstance(model.transformer_blocks[1].txt_mlp.net[2], PackedLinear)
    a, b = predicted(load_model(dense)[0]), predicted(model)
    assert 0 < (a - b).norm() < 0.05 * a.norm()
