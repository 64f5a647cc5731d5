"""Extractors from local weight folders: features that mean something, pinned weights, one line for missing ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from ditcompress.errors import DitcompressError
from ditcompress.evaluation.extractors import Request, extract, registry
from ditcompress.evaluation.extractors.dinov2 import prepared

from .external_samples import pin, write_clips

IMAGES = torch.rand(6, 3, 20, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write_dinov2(root: Path) -> Path:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, mlp_ratio=2
    )
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(root / "dinov2")
    return pin(root)


WRITERS: dict[str, Callable[[Path], Path]] = {"clip": write_clips, "dinov2": write_dinov2}


def request(root: Path | None, shape: tuple[int, int, int] = (3, 20, 16), argument: str = "") -> Request:
    return Request(argument, shape, weights=root)


@pytest.mark.parametrize("name", WRITERS)
def test_features_depend_on_the_image_and_not_on_its_neighbours(name: str, tmp_path: Path) -> None:
    found = registry.get(name).open_extractor(request(WRITERS[name](tmp_path)))
    all_at_once = extract(found, [IMAGES])
    assert all_at_once.shape[0] == len(IMAGES)
    assert abs(all_at_once[0] - all_at_once[1]).max() > 1e-4
    one_by_one = extract(found, list(IMAGES.split(1)))
    assert abs(all_at_once - one_by_one).max() < 1e-5
    assert len(found.sha256) == 64


def test_grey_images_are_seen_as_rgb(tmp_path: Path) -> None:
    found = registry.get("dinov2").open_extractor(request(write_dinov2(tmp_path), (1, 20, 16)))
    grey = IMAGES[:, :1]
    assert torch.equal(found.features(grey), found.features(grey.expand(-1, 3, -1, -1)))


def test_dinov2_pixels_are_normalised_as_imagenet() -> None:
    white = prepared(torch.ones(1, 3, 8, 8))
    assert white.shape == (1, 3, 224, 224)
    assert torch.allclose(
        white[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    )


@pytest.mark.parametrize("name", ["clip", "dinov2", "inception"])
def test_missing_weights_are_one_line(name: str, tmp_path: Path) -> None:
    for root in (None, pin(tmp_path)):
        with pytest.raises(DitcompressError) as caught:
            registry.get(name).open_extractor(request(root))
        assert caught.value.code == "E337"
        assert "\n" not in caught.value.line()


@pytest.mark.parametrize("name", WRITERS)
def test_changed_weights_are_refused(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    weights = root / name / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DitcompressError, match="sha256 pinned") as caught:
        registry.get(name).open_extractor(request(root))
    assert caught.value.code == "E337"


def test_another_folder_can_be_named(tmp_path: Path) -> None:
    write_dinov2(tmp_path)
    (tmp_path / "dinov2").rename(tmp_path / "mine")
    pin(tmp_path)
    found = registry.get("dinov2").open_extractor(request(tmp_path, argument="mine"))
    assert found.features(IMAGES).shape == (6, 16)


def test_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DitcompressError, match="not grey or RGB"):
        registry.get("clip").open_extractor(request(tmp_path, (4, 8, 8)))
