"""Metrics whose library is never in the tested environment, by stand-ins that check the calls; and their arithmetic.

The same modules were run once against the real torch-fidelity 0.4.0, lpips 0.1.4, hpsv2 1.2.0 and ImageReward 1.5
(under transformers 4.30) with random weights, and agreed with those packages' own results.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from ditcompress.evaluation import external
from ditcompress.evaluation.external import _distances, hpsv2, image_reward, inception_fid, run_external
from ditcompress.evaluation.pixels import to_bytes, to_pil

from .external_samples import COMPRESSED, ORIGINAL, PROMPTS, REFERENCE, N, pin, put, samples


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A stand-in module, with its parents."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    found = types.ModuleType(name)
    vars(found).update(contents)
    monkeypatch.setitem(sys.modules, name, found)


def means(images: torch.Tensor) -> torch.Tensor:
    return images.double().mean((1, 2, 3))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slice1, self.slice2 = nn.Sequential(), nn.Sequential()
        self.slice1.add_module("0", nn.Conv2d(3, 2, 3))
        self.slice2.add_module("3", nn.Conv2d(2, 2, 3))


class Lpips(nn.Module):
    """Distance by the loaded trunk, so that wrong or missing weights show."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        assert given == {"net": "alex", "pnet_rand": True, "verbose": False}  # a trunk of its own is a download
        self.net = Trunk()

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        weight = self.net.slice2.get_submodule("3").weight.sum() + self.net.slice1.get_submodule("0").bias.sum()
        return ((first - second).square().mean((1, 2, 3), keepdim=True) * weight).float()


def test_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "lpips", LPIPS=Lpips)
    name = external.registry.get("lpips").WEIGHTS[0]
    put(tmp_path, (name,))
    state = {"features.0.weight": torch.ones(2, 3, 3, 3), "features.0.bias": torch.full((2,), 0.5),
             "features.3.weight": torch.full((2, 2, 3, 3), 0.25), "features.3.bias": torch.zeros(2),
             "classifier.1.weight": torch.ones(1)}  # fmt: skip
    torch.save(state, tmp_path / name)
    (row,), skipped = run_external(["lpips"], samples(pin(tmp_path), prompts=None, reference=None))
    expected = 10 * (ORIGINAL - COMPRESSED).square().mean((1, 2, 3)).double().numpy()
    assert skipped == [] and row.value == pytest.approx(expected.mean(), rel=1e-5) and row.n == N
    assert row.high - row.value == pytest.approx(2.0166922 * expected.std(ddof=1) / np.sqrt(N), rel=1e-4)
    assert not row.higher_is_better and not row.identical
    del state["features.3.weight"]
    torch.save(state, tmp_path / name)
    assert "no features.3.weight" in run_external(["lpips"], samples(pin(tmp_path)))[1][0].reason


def test_image_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, image_reward.WEIGHTS)
    paths = [tmp_path / name for name in image_reward.WEIGHTS]

    class Model:
        def score(self, prompt: str, image: Any) -> float:
            assert image.mode == "RGB" and prompt in PROMPTS
            return float(np.asarray(image, np.float64).mean()) + PROMPTS.index(prompt)

    def load(name: str, device: str, med_config: str) -> Model:
        assert (name, device, med_config) == (str(paths[0]), "cpu", str(paths[1]))
        assert Path("bert-base-uncased").resolve() == paths[2].resolve()  # where the package finds its tokenizer
        return Model()

    module(monkeypatch, "ImageReward", load=load)
    before = Path.cwd()
    (row,), skipped = run_external(["image_reward"], samples(pin(tmp_path)))
    assert skipped == [] and Path.cwd() == before
    first, second = (to_bytes(x).double().mean((1, 2, 3)).numpy() for x in (ORIGINAL, COMPRESSED))
    assert row.original == pytest.approx((first + np.arange(N)).mean())
    assert row.value == pytest.approx((second - first).mean()) and row.low < row.value < row.high


def test_hpsv2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            assert not self.training and not torch.is_grad_enabled()
            return {"image_features": self.scale * pixels.mean((2, 3)), "text_features": tokens}

    def create(*names: Any, **given: Any) -> Any:
        assert names == ("ViT-H-14",) and given["pretrained"] is None  # anything else is a download
        assert given["light_augmentation"] and given["output_dict"]
        return Model(), None, lambda image: torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1)

    def tokenizer(name: str) -> Any:
        assert name == "ViT-H-14"
        return lambda texts: torch.tensor([[1.0 + PROMPTS.index(text)] * 3 for text in texts])

    module(monkeypatch, "hpsv2.src.open_clip", create_model_and_transforms=create, get_tokenizer=tokenizer)
    put(tmp_path, hpsv2.WEIGHTS)
    torch.save({"state_dict": {"scale": torch.full((1,), 0.01)}, "epoch": 1}, tmp_path / hpsv2.WEIGHTS[0])
    (row,), skipped = run_external(["hpsv2"], samples(pin(tmp_path)))
    rank = 1.0 + np.arange(N)
    first, second = (
        np.stack([np.asarray(i, np.float64).mean((0, 1)) for i in to_pil(x)]).sum(1) for x in (ORIGINAL, COMPRESSED)
    )
    assert skipped == [] and row.original == pytest.approx((0.01 * rank * first).mean(), rel=1e-4)
    assert row.value == pytest.approx((0.01 * rank * (second - first)).mean(), rel=1e-3)
    torch.save({"other": 1}, tmp_path / hpsv2.WEIGHTS[0])
    assert "no state_dict" in run_external(["hpsv2"], samples(pin(tmp_path)))[1][0].reason


class Inception(nn.Module):
    """Four features and three logits of the bytes."""

    path = ""

    def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert layers == ["2048", "logits_unbiased"] and feature_extractor_weights_path == Inception.path

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        corners = x[:, :, ::13, ::13].float().flatten(1) / 255
        return corners[:, :4], corners[:, 4:7]


def test_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3", FeatureExtractorInceptionV3=Inception)
    put(tmp_path, inception_fid.WEIGHTS)
    Inception.path = str(tmp_path / inception_fid.WEIGHTS[0])
    rows, skipped = run_external(["inception_fid"], samples(pin(tmp_path)))
    named = {row.name: row for row in rows}
    assert skipped == [] and sorted(named) == sorted(
        ["inception_fd_original", "inception_fid", "inception_kid", "inception_score"]
    )
    model = Inception("", ["2048", "logits_unbiased"], Inception.path)
    x, y, real = (model(to_bytes(i))[0].double().numpy() for i in (ORIGINAL, COMPRESSED, REFERENCE))
    fid = named["inception_fid"]
    assert fid.original == pytest.approx(plain_frechet(x, real)) and fid.compressed == pytest.approx(
        plain_frechet(y, real)
    )
    assert fid.value == pytest.approx(fid.compressed - fid.original) and fid.low < fid.value < fid.high
    assert "compare only at the same N" in fid.note and "30 reference images" in fid.note and fid.n == N
    assert named["inception_fd_original"].value == pytest.approx(plain_frechet(x, y))
    assert named["inception_fd_original"].low is None
    assert named["inception_kid"].original == pytest.approx(plain_mmd(x, real, _distances.polynomial))
    same = run_external(["inception_fid"], samples(tmp_path, compressed=samples().original))[0]
    assert all(row.value == 0 and row.identical for row in same)
    few = samples(tmp_path, original=samples().reference, compressed=samples().reference)
    assert "30 images are too few: 40 are needed" in run_external(["inception_fid"], few)[1][0].reason


def plain_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as it stands, with a matrix square root."""
    root = linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    return float(
        ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)
    )


def plain_mmd(x: np.ndarray, y: np.ndarray, kernel: Any) -> float:
    n, m = len(x), len(y)
    inside = [(kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(sum(inside) - 2 * kernel(x, y).sum() / (n * m))


def features(seed: int, n: int, d: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def test_frechet_of_known_gaussians() -> None:
    """Samples whitened to have exactly the moments asked for: d (shift^2 + (s - 1)^2)."""
    d = 5
    x = features(0, 400, d)
    x -= x.mean(0)
    x = x @ linalg.inv(linalg.cholesky(np.cov(x, rowvar=False)))
    assert _distances.frechet(x, 3 * x + 2) == pytest.approx(d * (4 + 4), rel=1e-10)
    assert _distances.frechet(x, x.copy()) == 0
    few, others = features(1, 6, 20), features(2, 9, 20, 1.0)  # fewer images than dimensions
    assert _distances.frechet(few, others) == pytest.approx(plain_frechet(few, others), rel=1e-5)


def test_mmd_and_its_jackknife_equal_plain_loops() -> None:
    x, y, real = features(0, 45, 6), features(1, 45, 6, 0.4), features(2, 33, 6, 0.1)
    for kernel in (_distances.polynomial, _distances.gaussian):
        first, second, (low, high) = _distances.mmd_difference(x, y, real, kernel, 3)
        assert first == pytest.approx(plain_mmd(x, real, kernel)) and second == pytest.approx(
            plain_mmd(y, real, kernel)
        )
        groups = _distances.groups_of(45, 3)
        without = np.array(
            [plain_mmd(y[groups != g], real, kernel) - plain_mmd(x[groups != g], real, kernel) for g in range(20)]
        )
        assert (low, high) == pytest.approx(_distances.jackknife_interval(second - first, without))


def test_blocks_of_rows_do_not_change_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, real = features(0, 45, 6), features(1, 45, 6, 0.4), features(2, 33, 6)
    before = (
        _distances.mmd_difference(x, y, real, _distances.gaussian, 0),
        _distances.mmd_paired(x, y, _distances.gaussian),
    )
    monkeypatch.setattr(_distances, "_ROWS", 7)
    after = _distances.mmd_difference(x, y, real, _distances.gaussian, 0)
    assert after[:2] == pytest.approx(before[0][:2]) and after[2] == pytest.approx(before[0][2])
    assert _distances.mmd_paired(x, y, _distances.gaussian) == pytest.approx(before[1])


def test_inception_score_of_known_classes() -> None:
    certain = 50 * np.eye(4)[np.arange(40) % 4]
    assert _distances.inception_score(certain) == pytest.approx(4)
    assert _distances.inception_score(np.ones((40, 4))) == pytest.approx(1)
    first, second, (low, high) = _distances.score_difference(certain, np.ones((40, 4)), 0)
    assert second - first == pytest.approx(-3) and low <= -3 <= high


def test_the_interval_of_a_difference_covers_it() -> None:
    """Same-noise pairs: the difference of distances to a reference, over 60 draws, 18 in 20 intervals or more."""
    truth_x, truth_y = features(9, 20000, 3, 0.5), features(9, 20000, 3, 0.5) * 1.2
    real = features(8, 2000, 3)
    truth = _distances.frechet(truth_y, real) - _distances.frechet(truth_x, real)
    held = 0
    for draw in range(60):
        rows = np.random.default_rng(draw).integers(0, 20000, 400)
        _, _, (low, high) = _distances.frechet_difference(truth_x[rows], truth_y[rows], real, draw)
        held += low <= truth <= high
    assert held >= 54
