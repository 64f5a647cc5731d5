"""Distribution metrics (T4): one metric a file, registered under its name, computed on features of an extractor.

A metric exports LABEL, LEAST (fewest images it makes sense for), and

    measure(features: FeatureSets) -> list[Measurement]

Every interval is on a difference: both models draw from the same noise, so rows of `original` and `compressed` are
pairs and groups of pairs are deleted together (20-group delete-group jackknife).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ...registry import Registry
from ...result import Measurement, Skipped

registry = Registry("ditcompress.evaluation.distribution", "distribution metric", ("LABEL", "LEAST", "measure"))


@dataclass(frozen=True)
class FeatureSets:
    """Features (images, dimensions), float64. `original` and `compressed` are pairs of the same noise and condition;
    `fresh` are images of the original from other noise, for the noise floor; `reference` real images."""

    original: np.ndarray
    compressed: np.ndarray
    reference: np.ndarray | None = None
    fresh: np.ndarray | None = None
    seed: int = 0

    @property
    def identical(self) -> bool:
        return bool(np.array_equal(self.original, self.compressed))

    @property
    def note(self) -> str:
        n, d = self.original.shape
        return f"{n} images for {d} dimensions: mostly bias below {10 * d}" if n < 10 * d else ""


def measure_all(features: FeatureSets, names: Sequence[str] | None = None) -> tuple[list[Measurement], list[Skipped]]:
    """Every registered metric (or those named); too few images or features that are not finite skip a metric."""
    rows, skipped = [], []
    for name in names or registry.names():
        metric = registry.get(name)
        reason = why_not(metric, features)
        if reason:
            skipped.append(Skipped(metric.LABEL, reason, "E334"))
        else:
            rows += metric.measure(features)
    return rows, skipped


def why_not(metric: ModuleType, features: FeatureSets) -> str:
    """The reason a metric cannot be computed; "" for none."""
    least = min(len(x) for x in (features.original, features.reference) if x is not None)
    if least < metric.LEAST:
        return f"{least} images, at least {metric.LEAST} are needed"
    for name, x in (
        ("original model's", features.original),
        ("compressed model's", features.compressed),
        ("reference", features.reference),
        ("original model's fresh", features.fresh),
    ):
        if x is not None and not np.isfinite(x).all():
            return f"features of the {name} images are not finite"
    return ""
