"""The result loads with plain diffusers in a fresh process, bit for bit, alone and in a pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import ditcompress
from ditcompress import api
from ditcompress.checkpoint.reader import open_checkpoint
from ditcompress.errors import DitcompressError
from ditcompress.loading import dequantized, load_model
from ditcompress.models import dit, registry
from ditcompress.recipe import load_recipe
from ditcompress.runtime.linear import PackedLinear


def fresh(code: str, *arguments: str) -> str:
    """The last line of a new interpreter's output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


LOAD = """
import sys, hashlib, torch
{first}
{second}
model = DiTTransformer2DModel.from_pretrained(sys.argv[1])
torch.manual_seed(0); torch.set_num_threads(1)
c = model.config
x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
with torch.no_grad():
    y = model(x, torch.tensor([3, 900]), torch.tensor([0, 1])).sample
print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""
IMPORTS = ("import ditcompress", "from diffusers import DiTTransformer2DModel")


@pytest.mark.parametrize("order", [IMPORTS, IMPORTS[::-1]], ids=["ours first", "diffusers first"])
def test_stock_from_pretrained_gives_the_same_outputs_in_a_fresh_process(w4a8: Path, order: tuple[str, str]) -> None:
    import hashlib

    model, _ = load_model(w4a8)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    c = model.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
    with torch.no_grad():
        y = model(x, torch.tensor([3, 900]), torch.tensor([0, 1])).sample
    expected = hashlib.sha256(y.numpy().tobytes()).hexdigest()
    assert fresh(LOAD.format(first=order[0], second=order[1]), str(w4a8)) == expected


def test_every_stored_tensor_survives_a_bfloat16_load_bit_for_bit(w4a8: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(w4a8, torch_dtype=torch.bfloat16)
    checkpoint = open_checkpoint(w4a8)
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 18
    for name, module in packed:
        for suffix, tensor in module.stored_tensors().items():
            stored = checkpoint.read(f"{name}.{suffix}")
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored)


def test_saving_the_loaded_model_again_gives_the_same_model(w4a8: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(w4a8)
    model.save_pretrained(tmp_path / "again")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_the_whole_pipeline_loads_and_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_type="ada_norm_zero",
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))  # fmt: skip # noqa: E501
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    api.quantize(tmp_path / "pipe", "w8a16", tmp_path / "small")
    pipe = DiTPipeline.from_pretrained(tmp_path / "small")
    assert isinstance(pipe.transformer.transformer_blocks[0].attn1.to_q, PackedLinear)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1], num_inference_steps=2, output_type="np").images
    assert images.shape[0] == 1 and (images == images).all()


def test_a_model_in_memory_is_compressed_into_a_new_one() -> None:
    model = dit.tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ditcompress.quantize(model, "w8a16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.model is not None and isinstance(result.model.transformer_blocks[0].ff.net[2], PackedLinear)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *dit.latent_shape(model.config), generator=generator)
    cond = dit.random_conditions(model.config, 2, generator)
    with torch.no_grad():
        a, b = (dit.predict(m, latents, torch.tensor([5, 500]), cond) for m in (model, result.model))
    assert 0 < (a - b).norm() < 0.05 * a.norm()


def test_the_reported_size_is_what_lies_on_disk(tiny_dit: Path, tmp_path: Path) -> None:
    result = api.quantize(tiny_dit, "w4a16-rtn", tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert result.bytes == sum(f.stat().st_size for f in files)
    stored = open_checkpoint(tmp_path / "out").tensors
    names = {r.site for r in result.records}
    counted = sum(
        e.stop - e.start for n, e in stored.items() if n.rpartition(".")[0] in names and not n.endswith(".bias")
    )
    assert counted == sum(r.stored_bytes for r in result.records)


def test_the_same_command_gives_the_same_bytes(tiny_dit: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        api.quantize(tiny_dit, "w4a8", tmp_path / name, overrides=["calibration.samples=4", "calibration.steps=4"])
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("a", "b")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("recipe", ["w4a8", "w4a8-ditas", "w8a16"])
def test_the_dequantized_export_loads_in_stock_diffusers_without_us(
    recipe: str, tiny_dit: Path, tmp_path: Path
) -> None:
    few = ["calibration.samples=2", "calibration.steps=3"] if recipe != "w8a16" else []
    more = ["calibration.buckets=3", "rules.*.rank=4"] if "ditas" in recipe else []
    api.quantize(tiny_dit, recipe, tmp_path / "packed", overrides=few + more)
    api.export(tmp_path / "packed", tmp_path / "plain", "diffusers", dtype="float32")
    code = """
    import sys
    from diffusers import DiTTransformer2DModel
    model, info = DiTTransformer2DModel.from_pretrained(sys.argv[1], output_loading_info=True)
    assert not any(m.startswith("ditcompress") for m in sys.modules)
    kind = type(model.transformer_blocks[0].attn1.to_q).__name__
    print(len(info["missing_keys"]), len(info["unexpected_keys"]), kind)
    """
    assert fresh(code, str(tmp_path / "plain")) == "0 0 Linear"
    plain, _ = load_model(tmp_path / "plain")
    packed, _ = load_model(tmp_path / "packed")
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.allclose(plain.get_submodule(name).weight, module.weight, rtol=1e-6)


def test_the_packed_export_is_one_file_that_loads_alone(w4a8: Path, tmp_path: Path) -> None:
    facts = api.export(w4a8, tmp_path / "one.safetensors", "safetensors")
    model, _ = load_model(tmp_path / "one.safetensors")
    other, _ = load_model(w4a8)
    state = other.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert facts["bytes"] == (tmp_path / "one.safetensors").stat().st_size


def test_a_dequantized_model_is_a_plain_one(w4a8: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(w4a8)
    c = model.config
    given = torch.randn(1, c.in_channels, c.sample_size, c.sample_size), torch.tensor([400]), torch.tensor([1])
    model.dequantize()
    assert "quantization_config" not in model.config and not any(isinstance(m, PackedLinear) for m in model.modules())
    model.save_pretrained(tmp_path / "plain")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "plain")
    states = model.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in {*states[0], *states[1]})
    with torch.no_grad():
        assert torch.allclose(model(*given).sample, again(*given).sample, atol=1e-4)
    api.quantize(model, "w4a16-rtn")  # it may be compressed again


def test_dequantizing_keeps_the_type_of_the_model_and_refuses_what_no_linear_does(tmp_path: Path) -> None:
    family = registry.get("generic")
    family.tiny().save_pretrained(tmp_path / "generic")
    api.quantize(tmp_path / "generic", "w4a16-rtn", tmp_path / "small")
    model, _ = load_model(tmp_path / "small", dtype=torch.bfloat16)
    kept = {name: p.dtype for name, p in dequantized(model).named_parameters()}
    assert {kept[name] for name in kept if name.endswith(".weight") and kept[name] != torch.float32} == {torch.bfloat16}
    given = family.random_conditions(model.config, 1, torch.Generator().manual_seed(0))
    latents = torch.zeros(1, *family.latent_shape(model.config), dtype=torch.bfloat16)
    with torch.no_grad():
        assert family.predict(model, latents, torch.tensor([400]), given).isfinite().all()
    few = ["calibration.samples=2", "calibration.steps=2", "training.steps=1", "training.batch=2"]
    made = api.quantize(registry.get("dit").tiny(), load_recipe("terdit", few)).model
    assert made is not None
    with pytest.raises(DitcompressError, match=r"E205.*normalises its output"):
        dequantized(made)
