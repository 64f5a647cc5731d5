"""T3, paired samples: the same noise, conditions, sampler and guidance through both models, compared image by image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..console import Reporter
from ..result import Measurement
from . import metrics
from .intervals import mean_interval, median_interval, rare_rate
from .subject import Subject


@dataclass(frozen=True)
class Pairs:
    """Images of both models, float32 (n, channels, height, width), and the data range for PSNR and SSIM."""

    original: Tensor
    compressed: Tensor
    peak: float


def make_pairs(subject: Subject, work: Path | None, reporter: Reporter) -> Pairs:
    """`settings.pairs` pairs in chunks; with a work folder, finished chunks of an interrupted run are reused."""
    settings = subject.settings
    parts: dict[str, list[Tensor]] = {"original": [], "compressed": []}
    chunks = [list(range(i, min(i + settings.batch, settings.pairs))) for i in range(0, settings.pairs, settings.batch)]
    with reporter.task("paired samples (T3)", 2 * settings.pairs) as advance:
        for name, model in (("original", subject.original), ("compressed", subject.compressed)):
            for chunk in chunks:
                images = _stored(work, name, chunk[0])
                if images is None:
                    images = subject.sample(model, chunk)
                    _store(work, name, chunk[0], images)
                parts[name].append(images)
                advance(len(chunk))
    original, compressed = torch.cat(parts["original"]), torch.cat(parts["compressed"])
    peak = 2.0 if subject.pixels else float(original.max() - original.min())
    return Pairs(original, compressed, peak)


def _stored(work: Path | None, name: str, start: int) -> Tensor | None:
    path = work / f"{name}-{start:06d}.safetensors" if work else None
    return load_file(path)["images"] if path and path.exists() else None


def _store(work: Path | None, name: str, start: int, images: Tensor) -> None:
    if work is not None:
        path = work / f"{name}-{start:06d}.safetensors"
        save_file({"images": images.contiguous()}, f"{path}.part")
        os.replace(f"{path}.part", path)


def per_pair(pairs: Pairs) -> dict[str, np.ndarray]:
    """Every registered metric on every pair."""
    return {
        name: metric.values(pairs.original, pairs.compressed, pairs.peak).numpy()
        for name, metric in metrics.registry.all().items()
    }


def unrelated_psnr(pairs: Pairs) -> float:
    """Median PSNR of different images of the original: what "no relation" looks like."""
    shifted = pairs.original.roll(1, 0)
    return float(np.median(metrics.registry.get("psnr").values(pairs.original, shifted, pairs.peak).numpy()))


def measurements(pairs: Pairs, values: dict[str, np.ndarray], unit: str) -> list[Measurement]:
    """Median PSNR with its interval, its 5th percentile and worst pair, SSIM, and the shares of poor pairs."""
    psnr, n = values["psnr"], len(values["psnr"])
    found = bool(np.isfinite(pairs.compressed.numpy()).all())
    identical = bool(torch.equal(pairs.original, pairs.compressed))
    if not found:
        psnr = np.where(np.isfinite(psnr), psnr, -np.inf)
    low, high = median_interval(psnr)
    floor = unrelated_psnr(pairs) if n > 1 else None
    note = unit if found else "some outputs are not finite"
    rows = [
        Measurement("psnr", "paired PSNR, median", "T3", "dB", True, float(np.median(psnr)), low, high, n=n,
                    floor=floor,
                    identical=identical, note=note),
        Measurement("psnr_p05", "paired PSNR, 5th percentile", "T3", "dB", True,
                    float(np.quantile(psnr, 0.05, method="lower")),
                    n=n, identical=identical),
        Measurement("psnr_worst", "paired PSNR, worst pair", "T3", "dB", True, float(psnr.min()), n=n,
                    identical=identical),
    ]  # fmt: skip
    for name, metric in metrics.registry.all().items():
        if name != "psnr":
            a, b = mean_interval(values[name])
            rows.append(Measurement(name, metric.LABEL, "T3", metric.UNIT, metric.HIGHER_IS_BETTER,
                                    float(values[name].mean()), a, b, n=n, identical=identical))  # fmt: skip
    for limit in (20, 15):
        events = int((psnr < limit).sum())
        a, b = rare_rate(events, n)
        rows.append(Measurement(f"pairs_under_{limit}", f"pairs under {limit} dB", "T3", "%", False, 100 * events / n,
                                100 * a, 100 * b, n=n, identical=identical))  # fmt: skip
    return rows


def summary(values: dict[str, np.ndarray], conditions: Any) -> dict[str, Any]:
    """What the report draws: sorted PSNR, and the worst pairs with their labels."""
    psnr = values["psnr"]
    order = np.argsort(psnr, kind="stable")
    labels = conditions.labels
    named = None if labels is None else [int(v) for v in labels.tolist()]
    return {
        "psnr": [float(v) for v in psnr],
        "worst": [int(i) for i in order[:8]],
        "labels": None if named is None else named[: len(psnr)],
    }


def chosen_images(pairs: Pairs, psnr: np.ndarray, count: int, seed: int) -> dict[str, list[int]]:
    """Indices of `count` seeded-random pairs and of the `count` worst."""
    random = np.random.default_rng(seed).permutation(len(psnr))[:count]
    return {
        "random": sorted(int(i) for i in random),
        "worst": [int(i) for i in np.argsort(psnr, kind="stable")[:count]],
    }
