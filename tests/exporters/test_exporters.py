"""Exports hold the values that were meant, or fail and leave nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline

from ditcompress import api
from ditcompress.checkpoint.reader import open_checkpoint
from ditcompress.checkpoint.writer import ShardWriter
from ditcompress.errors import DitcompressError
from ditcompress.loading import load_model
from ditcompress.models import dit
from ditcompress.runtime.linear import PackedLinear

LAYER = "transformer_blocks.0.attn1.to_q"


def test_a_value_that_float16_cannot_hold_is_an_error_and_not_an_infinity(tmp_path: Path) -> None:
    model = dit.tiny()
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(1e6)
    model.save_pretrained(tmp_path / "model")
    api.quantize(tmp_path / "model", "w8a16", tmp_path / "packed")
    with pytest.raises(DitcompressError, match=f"{LAYER}.weight") as caught:
        api.export(tmp_path / "packed", tmp_path / "plain", "diffusers", dtype="float16")
    assert caught.value.code == "E701" and not (tmp_path / "plain").exists()
    api.export(tmp_path / "packed", tmp_path / "plain", "diffusers", dtype="bfloat16")
    again = open_checkpoint(tmp_path / "plain")
    assert all(torch.isfinite(again.read(name)).all() for name in again.tensors)


def test_the_model_s_own_scheduler_goes_along(tmp_path: Path) -> None:
    dit.tiny().save_pretrained(tmp_path / "model")
    DDIMScheduler(beta_start=0.002).save_pretrained(tmp_path / "model/scheduler")
    api.quantize(tmp_path / "model", "w8a16", tmp_path / "packed")
    api.export(tmp_path / "packed", tmp_path / "plain", "diffusers")
    assert DDIMScheduler.from_pretrained(tmp_path / "plain/scheduler").config.beta_start == 0.002


@pytest.mark.parametrize("format", ["diffusers", "safetensors"])
def test_an_export_that_reads_back_differently_is_an_error(
    format: str, w4a8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ShardWriter.add

    def flip(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        add(self, name, tensor.flip(0) if name == f"{LAYER}.bias" else tensor)

    monkeypatch.setattr(ShardWriter, "add", flip)
    with pytest.raises(DitcompressError, match=f"{LAYER}.bias") as caught:
        api.export(w4a8, tmp_path / "out.safetensors", format)
    assert caught.value.code == "E323"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_compressed_pipeline_becomes_a_plain_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))  # fmt: skip # noqa: E501
    DiTPipeline(dit.tiny(), vae, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    api.quantize(tmp_path / "pipe", "w8a16", tmp_path / "small")
    api.export(tmp_path / "small", tmp_path / "plain", "diffusers", dtype="float32")
    transformer = DiffusionPipeline.from_pretrained(tmp_path / "plain").transformer
    packed, _ = load_model(tmp_path / "small")
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            weight = transformer.get_submodule(name).weight
            assert type(transformer.get_submodule(name)) is torch.nn.Linear
            assert torch.allclose(weight, module.weight, rtol=1e-6)


def test_a_file_inside_the_input_is_refused(w4a8: Path) -> None:
    before = sorted(w4a8.iterdir())
    with pytest.raises(DitcompressError, match=r"E501.*lies inside the input"):
        api.export(w4a8, w4a8 / "other", "safetensors")
    assert sorted(w4a8.iterdir()) == before
