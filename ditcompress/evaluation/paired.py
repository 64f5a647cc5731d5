"""T3, paired samples: the same noise, conditions, sampler and guidance through both models, compared image by image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..result import Measurement
from . import metrics
from .images import ImageSet
from .intervals import mean_interval, median_interval, rare_rate
from .subject import Subject


@dataclass(frozen=True)
class Pairs:
    """Images of both models, and the data range for PSNR and SSIM."""

    original: ImageSet
    compressed: ImageSet
    peak: float
    count: int

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of both models' images, up to `count` pairs."""
        left = self.count
        for first, second in zip(self.original.chunks(), self.compressed.chunks(), strict=True):
            if left <= 0:
                return
            yield first[:left], second[:left]
            left -= len(first)


@dataclass(frozen=True)
class PairValues:
    """Every registered metric on every pair, and on unrelated pairs of the original's images (the noise floor)."""

    values: dict[str, np.ndarray]
    unrelated: dict[str, np.ndarray]
    identical: bool
    finite: bool


def data_range(images: ImageSet, pixels: bool) -> float:
    """2 for images in [-1, 1]; the range of the original's latents."""
    if pixels:
        return 2.0
    low, high = np.inf, -np.inf
    for chunk in images.chunks():
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    return high - low


def compare_pairs(pairs: Pairs) -> PairValues:
    """One pass over the pairs, a chunk at a time."""
    table = metrics.registry.all()
    values: dict[str, list[Tensor]] = {name: [] for name in table}
    unrelated: dict[str, list[Tensor]] = {name: [] for name in table}
    identical = finite = True
    for original, compressed in pairs.chunks():
        identical &= bool(torch.equal(original, compressed))
        finite &= bool(torch.isfinite(compressed).all())
        for name, metric in table.items():
            values[name].append(metric.values(original, compressed, pairs.peak))
            if len(original) > 1:
                unrelated[name].append(metric.values(original, original.roll(1, 0), pairs.peak))
    join = {name: torch.cat(found).numpy() for name, found in values.items()}
    apart = {name: torch.cat(found).numpy() for name, found in unrelated.items() if found}
    return PairValues(join, apart, identical, finite)


def measurements(found: PairValues, unit: str) -> list[Measurement]:
    """Median PSNR with its interval, its 5th percentile and worst pair, SSIM, and the shares of poor pairs."""
    psnr, n, identical = found.values["psnr"], len(found.values["psnr"]), found.identical
    if not found.finite:
        psnr = np.where(np.isfinite(psnr), psnr, -np.inf)
    low, high = median_interval(psnr)
    floor = float(np.median(found.unrelated["psnr"])) if "psnr" in found.unrelated else None
    note = unit if found.finite else "some outputs are not finite"
    rows = [
        Measurement("psnr", "paired PSNR, median", "T3", "dB", True, float(np.median(psnr)), low, high, n=n,
                    floor=floor, identical=identical, note=note),
        Measurement("psnr_p05", "paired PSNR, 5th percentile", "T3", "dB", True,
                    float(np.quantile(psnr, 0.05, method="lower")), n=n, floor=floor, identical=identical),
        Measurement("psnr_worst", "paired PSNR, worst pair", "T3", "dB", True, float(psnr.min()), n=n, floor=floor,
                    identical=identical),
    ]  # fmt: skip
    for name, metric in metrics.registry.all().items():
        if name != "psnr":
            a, b = mean_interval(found.values[name])
            apart = float(found.unrelated[name].mean()) if name in found.unrelated else None
            rows.append(Measurement(name, metric.LABEL, "T3", metric.UNIT, metric.HIGHER_IS_BETTER,
                                    float(found.values[name].mean()), a, b, n=n, floor=apart,
                                    identical=identical))  # fmt: skip
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


def shown_images(subject: Subject, pairs: Pairs, psnr: np.ndarray) -> dict[str, list[tuple[int, Tensor, Tensor]]]:
    """(index, original, compressed) of `settings.shown` seeded-random pairs and of the worst."""
    count = subject.settings.shown
    random = np.random.default_rng(subject.settings.seed).permutation(len(psnr))[:count]
    chosen = {
        "random": sorted(int(i) for i in random),
        "worst": [int(i) for i in np.argsort(psnr, kind="stable")[:count]],
    }
    return {
        kind: list(zip(indices, pairs.original.take(indices), pairs.compressed.take(indices), strict=True))
        for kind, indices in chosen.items()
    }
