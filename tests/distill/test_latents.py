"""Cached latents: noising as the schedulers do it, passes over the shards, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ditcompress import api
from ditcompress.calibration.trajectory import generator
from ditcompress.console import Silent
from ditcompress.distill.latents import Latents
from ditcompress.distill.noising import Noising
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.evaluation.vae import decode, encode
from ditcompress.models import registry as families

from .models import cached, shortened


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_of_a_diffusion(kind: str) -> None:
    family = families.get("dit")
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", prediction_type=kind)
    noising = Noising(scheduler, family, family.tiny().config)
    draw = generator(0, 0)
    clean, noise = torch.randn(4, 8, 8, generator=draw), torch.randn(4, 8, 8, generator=draw)
    for index in (0, 500, 999):
        noised, target = noising(clean, noise, index)
        time = noising.timesteps[index : index + 1]
        assert torch.allclose(noised, scheduler.add_noise(clean[None], noise[None], time)[0], atol=1e-6)
        wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, time)}
        assert torch.allclose(target, wanted[kind], atol=1e-6)
        euler = diffusers.EulerDiscreteScheduler(beta_schedule="linear", prediction_type=kind)
        assert torch.equal(Noising(euler, family, family.tiny().config)(clean, noise, index)[0], noised)  # as it is fed


def test_noise_and_targets_of_a_flow() -> None:
    family = families.get("sd3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising = Noising(scheduler, family, family.tiny().config)
    draw = generator(0, 0)
    clean, noise = torch.randn(4, 8, 8, generator=draw), torch.randn(4, 8, 8, generator=draw)
    for index in (0, 500, 999):
        noised, target = noising(clean, noise, index)
        share = noising.timesteps[index] / 1000
        assert torch.allclose(noised, (1 - share) * clean + share * noise, atol=1e-5)
        assert torch.equal(target, noise - clean)
    assert noising.timesteps[500] > 700  # shifted
    dpm = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    other = Noising(dpm, family, family.tiny().config)
    assert other.kind == "flow" and len(other.timesteps) == len(other.noise)


def data(folder: Path, **options: Any) -> Latents:
    family = families.get("dit")
    config = diffusers.DiTTransformer2DModel.load_config(digits_folder() / "transformer")
    return Latents(folder, family, config, family.default_scheduler(config), **options)


def test_every_sample_comes_once_in_a_pass_and_parts_are_the_whole(tmp_path: Path) -> None:
    folder = cached(tmp_path / "d")
    latents = data(folder, null=0.5)
    stored = [load_file(folder / f"{n}.safetensors") for n in (0, 1)]
    seen = [latents._sample(position)["latents"] for position in range(32)]
    for start in (0, 16):
        everyone = torch.stack(seen[start : start + 16]).flatten(1).sum(1).sort().values
        assert torch.allclose(everyone, torch.cat([s["latents"] for s in stored]).flatten(1).sum(1).sort().values)
    whole = latents.batch(3, 8)
    parts = [data(folder, null=0.5).batch(3, 8, rows=slice(i, i + 4)) for i in (0, 4)]
    assert torch.equal(torch.cat([p.latents for p in parts]), whole.latents)
    assert torch.equal(torch.cat([p.cond["class_labels"] for p in parts]), whole.cond["class_labels"])
    assert 0 < (latents.batch(0, 64).cond["class_labels"] == 10).sum() < 64
    assert (data(folder, null=0).batch(0, 64).cond["class_labels"] < 10).all()


def test_an_own_null_condition_is_used(tmp_path: Path) -> None:
    folder = cached(tmp_path / "d", counts=(5,))
    tensors = load_file(folder / "0.safetensors")
    save_file({**tensors, "null.class_labels": torch.tensor([7])}, folder / "0.safetensors")
    assert set(data(folder, null=1).batch(0, 8).cond["class_labels"].tolist()) == {7}


def test_images_are_encoded_once(tmp_path: Path) -> None:
    draw = generator(0, 0)
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(0, 256, (8, 8), generator=draw, dtype=torch.uint8).numpy()
            Image.fromarray(pixels, "L").save(tmp_path / "images" / str(label) / f"{number}.png")
    student = shortened(digits_folder() / "transformer", tmp_path / "student", [0, 5])
    options: dict[str, Any] = {"steps": 3, "batch": 4, "data": str(tmp_path / "images"), "loss": "output=1,task=0.1"}
    notes = []
    for name in ("one", "two"):
        said = Silent()
        result = api.distill(digits_folder(), student, tmp_path / name, device="cpu", reporter=said, **options)
        notes.append(any("earlier run" in note for note in said.notes))
        assert set(result.facts["after"]) == {"output", "task"}
    assert notes == [False, True]
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(pixels, "L").save(flat / "0.png")
    with pytest.raises(DitcompressError, match=r"E338.*labels"):
        api.distill(digits_folder(), student, tmp_path / "x", device="cpu", **{**options, "data": str(flat)})


def test_images_to_latents_and_back() -> None:
    vae = diffusers.AutoencoderKL(sample_size=16, block_out_channels=(32,), latent_channels=4)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    images = torch.rand(5, 3, 16, 16, generator=generator(0, 0)) * 2 - 1
    latents = encode(vae.eval(), images)
    with torch.no_grad():
        plain = vae.encode(images).latent_dist.mode()
        assert torch.allclose(latents, (plain - 0.25) * 0.5, atol=1e-5)
        assert torch.allclose(decode(vae, latents), vae.decode(plain).sample, atol=1e-4)


def damage(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    labels, latents = tensors["class_labels"], tensors["latents"]
    return {
        "names": {"latent": latents, "class_labels": labels},
        "shape": {"latents": latents.repeat(1, 1, 2, 2), "class_labels": labels},
        "rank": {"latents": latents[0, 0, 0], "class_labels": labels},
        "count": {"latents": latents, "class_labels": labels[:2]},
        "missing": {"latents": latents},
        "range": {"latents": latents, "class_labels": labels + 50},
        "argument": {**tensors, "prompt": labels},
        "nan": {"latents": latents * float("nan"), "class_labels": labels},
        "scalar": {"latents": latents, "class_labels": torch.tensor(3)},
    }[how]


@pytest.mark.parametrize(
    ("how", "code"),
    [("names", "E338"), ("shape", "E338"), ("rank", "E338"), ("count", "E338"), ("missing", "E330"),
     ("range", "E330"), ("argument", "E330"), ("nan", "E338"), ("scalar", "E338"), ("empty", "E338"),
     ("torn", "E338"), ("differ", "E338")],
)  # fmt: skip
def test_data_that_do_not_fit(tmp_path: Path, how: str, code: str) -> None:
    folder = cached(tmp_path / "d")
    file = folder / "0.safetensors"
    if how == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif how == "torn":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "differ":
        tensors = load_file(file)
        save_file({**tensors, "null.class_labels": torch.tensor([10])}, file)
    else:
        tensors = load_file(file)
        for path in folder.iterdir():
            path.unlink()
        save_file({n: t.clone() for n, t in damage(tensors, how).items()}, file)
    student = shortened(digits_folder() / "transformer", tmp_path / "student", [0])
    with pytest.raises(DitcompressError) as caught:
        api.distill(digits_folder(), student, tmp_path / "out", steps=1, batch=2, data=str(folder), device="cpu")
    assert caught.value.code == code and not (tmp_path / "out").exists()


def test_a_label_beyond_the_checked_rows_is_one_line_too(tmp_path: Path) -> None:
    folder = cached(tmp_path / "d", counts=(70,))
    tensors = load_file(folder / "0.safetensors")
    tensors["class_labels"][69] = 1000
    save_file(tensors, folder / "0.safetensors")
    student = shortened(digits_folder() / "transformer", tmp_path / "student", [0])
    with pytest.raises(DitcompressError, match="E338"):
        api.distill(digits_folder(), student, tmp_path / "out", steps=2, batch=70, data=str(folder), device="cpu")


def test_a_nan_beyond_the_checked_rows_is_blamed_on_the_data(tmp_path: Path) -> None:
    folder = cached(tmp_path / "d", counts=(70,))
    tensors = load_file(folder / "0.safetensors")
    tensors["latents"][69] = float("nan")
    save_file(tensors, folder / "0.safetensors")
    student = shortened(digits_folder() / "transformer", tmp_path / "student", [0])
    with pytest.raises(DitcompressError, match=r"E338.*NaN"):
        api.distill(digits_folder(), student, tmp_path / "out", steps=2, batch=70, data=str(folder), device="cpu")


def test_clean_weights_are_the_slope_of_the_implied_clean_latents() -> None:
    family = families.get("dit")
    config = dict(family.tiny().config)
    scheduler = family.default_scheduler(config)
    noising = Noising(scheduler, family, config)
    times = torch.tensor([10, 300, 700])
    alpha = scheduler.alphas_cumprod[times].double()
    latents, step = torch.randn(3, 4, dtype=torch.float64), 1e-3
    clean = [(latents - (1 - alpha)[:, None].sqrt() * e) / alpha[:, None].sqrt() for e in (latents, latents + step)]
    slope = ((clean[1] - clean[0]) / step).square().mean(1)
    assert torch.allclose(noising.clean_weights(times).double(), slope.clamp_max(25), rtol=1e-4)
    assert float(noising.clean_weights(torch.tensor([999]))) == 25
