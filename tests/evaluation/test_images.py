"""Sampling for evaluation: the same image for the same index, whatever the batch, the interruption or the layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ditcompress import api
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.evaluation.images import CHUNK, ImageSet, InMemory, stored_count
from ditcompress.evaluation.reference import open_reference
from ditcompress.evaluation.sampling import image_sets, sample_set
from ditcompress.evaluation.settings import EvaluateSettings
from ditcompress.evaluation.subject import Subject, open_single

COUNT = CHUNK + 6


def opened(folder: Path, batch: int = 0, steps: int = 2, seed: int = 5, count: int = COUNT) -> Subject:
    settings = EvaluateSettings(steps=steps, guidance=1.5, batch=batch, seed=seed)
    return open_single(folder, settings, count, reporter=Silent())


def sampled(subject: Subject, folder: Path, count: int = COUNT) -> torch.Tensor:
    return torch.cat(list(sample_set(subject, folder, count, Silent()).chunks()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The images of one uninterrupted run."""
    return sampled(opened(digits_folder()), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def latent_pipeline(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random latent DiT with a random autoencoder that doubles the size, as a pipeline folder."""
    folder = tmp_path_factory.mktemp("pipeline") / "latent"
    shutil.copytree(tiny_dit, folder / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
            shift_factor=0.25,
        )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    scheduler: Any = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {"_class_name": "DiTPipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Counter(Silent):
    """Counts images that are reported as done, and stops the run when there are `most`."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        self.done, self.most = 0, most

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        self.total = total
        yield self.advance

    def advance(self, units: int) -> None:
        self.done += units
        if self.done >= self.most:
            raise KeyboardInterrupt


@pytest.mark.parametrize("batch", [1, 7])
def test_images_do_not_depend_on_the_batch_size_or_on_their_number(
    batch: int, whole: torch.Tensor, tmp_path: Path
) -> None:
    few = sampled(opened(digits_folder(), batch), tmp_path, 9)
    assert torch.allclose(few, whole[:9], atol=1e-4)
    assert all((few[i] - whole[j]).abs().max() > 1e-2 for i in range(9) for j in range(9) if i != j)


def test_any_indices_in_any_order_are_the_same_images(whole: torch.Tensor) -> None:
    subject, indices = opened(digits_folder(), 3), [65, 2, 40, 0, 69]
    assert torch.allclose(subject.images(subject.original, indices), whole[indices], atol=1e-4)
    other = opened(digits_folder(), 3, seed=6)
    assert (other.images(other.original, [0, 2]) - whole[[0, 2]]).abs().max() > 0.1


def test_an_interrupted_run_continues_to_the_same_images(whole: torch.Tensor, tmp_path: Path) -> None:
    subject = opened(digits_folder())
    with pytest.raises(KeyboardInterrupt):
        sample_set(subject, tmp_path, COUNT, Counter(CHUNK))
    first = ImageSet(tmp_path, "sample", COUNT).path(0)
    before = first.stat().st_mtime_ns
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    (tmp_path / f"{first.name[:-20]}.part").write_bytes(b"half")
    reporter = Counter()
    images = sample_set(subject, tmp_path, COUNT, reporter)
    assert reporter.done == reporter.total == COUNT and first.stat().st_mtime_ns == before
    assert torch.equal(torch.cat(list(images.chunks())), whole)
    assert torch.equal(torch.stack(images.take([66, 3, 3])), whole[[66, 3, 3]])
    assert [len(c) for c in images.chunks()] == [CHUNK, 6] and len(images) == COUNT


def test_a_damaged_or_short_chunk_is_made_again_and_a_long_one_is_cut(tmp_path: Path) -> None:
    made: list[list[int]] = []

    def make(indices: list[int]) -> torch.Tensor:
        made.append(indices)
        return torch.tensor(indices, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    def fill(count: int) -> list[float]:
        images = ImageSet(tmp_path, "x", count).fill(make, lambda units: None)
        found = torch.cat(list(images.chunks()))
        assert found.dtype == torch.float32 and found.shape[1:] == (1, 2, 2)
        return found[:, 0, 0, 0].tolist()

    assert fill(10) == list(range(10)) and fill(7) == list(range(7)) and len(made) == 1
    assert fill(2 * CHUNK) == list(range(2 * CHUNK))  # the short chunk grows
    assert made[1:] == [list(range(CHUNK)), list(range(CHUNK, 2 * CHUNK))]
    damaged = ImageSet(tmp_path, "x", 2 * CHUNK).path(CHUNK)
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert stored_count(damaged) == 0 == stored_count(tmp_path / "none")
    assert fill(2 * CHUNK) == list(range(2 * CHUNK)) and len(made) == 4
    memory = InMemory(torch.zeros(CHUNK + 1, 1, 2, 2))
    assert len(memory) == CHUNK + 1 and [len(c) for c in memory.chunks()] == [CHUNK, 1]


def test_both_models_get_the_same_noise_and_the_floor_another(tmp_path: Path) -> None:
    reporter = Counter()
    sets = image_sets(opened(digits_folder(), count=8), tmp_path, 8, True, reporter)
    first, second, fresh = (torch.cat(list(sets[name].chunks())) for name in ("original", "compressed", "fresh"))
    assert torch.equal(first, second) and (first - fresh).abs().flatten(1).amax(1).min() > 0.1
    assert reporter.done == reporter.total == 24


@pytest.mark.parametrize("layout", ["images", "adm"])
def test_what_a_layout_wrote_is_read_back_as_a_reference(layout: str, whole: torch.Tensor, tmp_path: Path) -> None:
    facts = api.sample(
        digits_folder(), tmp_path / "out", count=20, layout=layout, steps=2, guidance=1.5, seed=5, device="cpu"
    )
    assert facts["images"] == 20
    found = open_reference(tmp_path / "out" / "samples.npz" if layout == "adm" else tmp_path / "out", (3, 8, 8))
    images, subject = torch.cat(list(found.chunks())), opened(digits_folder(), count=20)
    assert images.shape == (20, 3, 8, 8) and (images - whole[:20].clamp(-1, 1)).abs().max() < 1 / 255 + 1e-3
    if layout == "adm":
        assert subject.conditions.labels is not None and found.labels is not None
        assert torch.equal(found.labels, subject.conditions.labels[:20].long())
    else:
        assert found.labels is None  # one folder for everything is no class


def test_latents_are_decoded_by_the_pipelines_own_vae(latent_pipeline: Path, tmp_path: Path) -> None:
    subject = opened(latent_pipeline, batch=4, count=6)
    assert subject.makes_images and not subject.pixels and subject.image_shape() == (3, 16, 16)
    latents = subject.sample(subject.original, list(range(6)))
    vae = diffusers.AutoencoderKL.from_pretrained(latent_pipeline / "vae").eval()
    with torch.no_grad():
        expected = torch.cat([vae.decode(latents[i : i + 1] / 0.5 + 0.25).sample for i in range(6)])
    images = sampled(subject, tmp_path, 6)
    assert images.shape == (6, 3, 16, 16) and torch.allclose(images, expected, atol=1e-4)
    one = opened(latent_pipeline, batch=1, count=6)
    assert torch.allclose(sampled(one, tmp_path / "one", 6), images, atol=1e-3)


def test_a_pipeline_without_its_vae_makes_no_images_and_a_broken_one_is_named(
    latent_pipeline: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(latent_pipeline, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(DitcompressError, match=r"E320.*VAE does not load"):
        opened(folder, count=4)
    (folder / "vae" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(DitcompressError, match=r"E320"):
        opened(folder, count=4)
    shutil.rmtree(folder / "vae")
    assert not opened(folder, count=4).makes_images
    with pytest.raises(DitcompressError, match=r"E205.*no VAE"):
        api.sample(folder, tmp_path / "out", count=4, steps=2, device="cpu")
    assert not (tmp_path / "out").exists()
