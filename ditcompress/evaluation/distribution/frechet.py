"""Fréchet distance of Gaussian fits to features (Heusel et al. 2017), to the original and to reference images.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Absolute values are biased upwards by the number of images, so the
distance to the reference is reported as the difference of both models on the same noise, and beside it the limit for
infinitely many images by a line in 1/N (Chong and Forsyth 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...result import Measurement
from . import FeatureSets
from ._jackknife import groups_of, interval

LABEL, LEAST = "Fréchet distance", 50
SIZES = 8  # points of the curve over 1/N
DRAWS = 8  # subsets drawn at each size


@dataclass(frozen=True)
class Moments:
    """Number, sum (d,) and sum of outer products (d, d) of features; subtracting a group's gives the rest's."""

    n: int
    total: np.ndarray
    outer: np.ndarray

    @staticmethod
    def of(x: np.ndarray) -> Moments:
        return Moments(len(x), x.sum(0), x.T @ x)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        return (self.outer - np.outer(self.total, self.total) / self.n) / (self.n - 1)


class Target:
    """One side of a distance, with the square root of its covariance kept for many comparisons."""

    def __init__(self, moments: Moments) -> None:
        self.mean, self.covariance = moments.mean, moments.covariance
        values, vectors = np.linalg.eigh(self.covariance)
        self.root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def distance(self, moments: Moments) -> float:
        """Squared Fréchet distance; rounding never takes it below zero."""
        cross = np.linalg.eigvalsh(self.root @ moments.covariance @ self.root).clip(0)
        shift = self.mean - moments.mean
        spread = np.trace(self.covariance) + np.trace(moments.covariance) - 2 * np.sqrt(cross).sum()
        return max(float(shift @ shift + spread), 0.0)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Fréchet distance of two feature sets (n, d), (m, d); exactly 0 for equal ones."""
    return 0.0 if np.array_equal(x, y) else Target(Moments.of(y)).distance(Moments.of(x))


def _left_out(x: np.ndarray) -> list[Moments]:
    """Moments with each group of rows deleted. Features are centred first: sums of squares keep their digits."""
    groups = groups_of(len(x))
    whole = Moments.of(x)
    return [whole - Moments.of(x[groups == g]) for g in range(groups.max() + 1)]


def _centred(features: FeatureSets) -> FeatureSets:
    centre = features.original.mean(0)
    move = lambda x: None if x is None else x - centre  # noqa: E731
    return FeatureSets(
        features.original - centre, features.compressed - centre, move(features.reference), move(features.fresh),
        features.seed,
    )  # fmt: skip


def measure(features: FeatureSets) -> list[Measurement]:
    """FD to the original, and where there is a reference the difference of both models' FD to it, also at N → ∞."""
    identical, note, n = features.identical, features.note, len(features.original)
    features = _centred(features)
    parts = _left_out(features.original), _left_out(features.compressed)
    value, left_out = 0.0, np.zeros(len(parts[0]))
    if not identical:
        value = frechet(features.compressed, features.original)
        left_out = np.array([Target(a).distance(b) for a, b in zip(*parts, strict=True)])
    low, high = interval(value, left_out)
    half = n // 2
    floor = frechet(features.original[:half], features.original[half : 2 * half])
    said = f"floor: halves of the original, N={half}"
    if features.fresh is not None:
        floor, said = frechet(features.fresh, features.original), "floor: the original with other noise"
    rows = [
        Measurement("fd_original", "Fréchet distance to the original", "T4", "", False, value, max(low, 0.0), high, n=n,
                    floor=floor, identical=identical, note=_join(said, note))
    ]  # fmt: skip
    return rows if features.reference is None else rows + _to_reference(features, parts, identical, note)


def _to_reference(
    features: FeatureSets, parts: tuple[list[Moments], list[Moments]], identical: bool, note: str
) -> list[Measurement]:
    assert features.reference is not None
    n, target = len(features.original), Target(Moments.of(features.reference))
    first, second = (target.distance(Moments.of(x)) for x in (features.original, features.compressed))
    difference = np.array([target.distance(b) - target.distance(a) for a, b in zip(*parts, strict=True)])
    low, high = interval(second - first, difference)
    floor = None
    if features.fresh is not None:
        floor = abs(target.distance(Moments.of(features.fresh)) - first)
    bias = f"absolute values are biased: compare only at N={n}"
    limits = [infinite(curve(x, target, features.seed))[0] for x in (features.original, features.compressed)]
    return [
        Measurement("fd_reference", "Fréchet distance to reference, difference", "T4", "", False, second - first, low,
                    high, n=n, original=first, compressed=second, floor=floor, identical=identical,
                    note=_join(bias, note)),
        Measurement("fd_reference_percent", "the same in per cent of the original's", "T4", "%", False,
                    100 * (second - first) / first if first else None, 100 * low / first if first else None,
                    100 * high / first if first else None, n=n, identical=identical),
        Measurement("fd_infinity", "Fréchet distance at N → ∞, difference", "T4", "", False, limits[1] - limits[0],
                    n=n, original=limits[0], compressed=limits[1], identical=identical,
                    note="line in 1/N, no interval"),
    ]  # fmt: skip


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def curve(x: np.ndarray, target: Target, seed: int) -> list[tuple[int, float]]:
    """(N, mean FD of seeded subsets of N rows of x) at sizes evenly spaced in 1/N, from a fifth to all rows."""
    random, n = np.random.default_rng(seed), len(x)
    sizes = sorted({round(1 / v) for v in np.linspace(1 / n, 5 / n, SIZES)})
    points = []
    for size in sizes:
        draws = DRAWS if size < n else 1
        found = [target.distance(Moments.of(x[random.permutation(n)[:size]])) for _ in range(draws)]
        points.append((size, float(np.mean(found))))
    return points


def infinite(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line of FD over 1/N."""
    inverse = np.array([1 / n for n, _ in points])
    slope, intercept = np.polyfit(inverse, [v for _, v in points], 1)
    return float(intercept), float(slope)


def curves(features: FeatureSets) -> list[dict[str, float | str]]:
    """FD to the reference against N of both models, for the report; [] without a reference."""
    if features.reference is None or len(features.original) < LEAST:
        return []
    target = Target(Moments.of(features.reference))
    return [
        {"model": name, "n": n, "fd": value}
        for name, x in (("original", features.original), ("compressed", features.compressed))
        for n, value in curve(x, target, features.seed)
    ]
