"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), k = 5.

The real manifold is the reference, or the original's images where there is none. Precision and density see fidelity,
recall and coverage diversity: a model that repeats 50 good images scores high on the first two and near 0 on the
others.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...result import Measurement
from . import FeatureSets
from ._jackknife import groups_of, interval

LABEL, LEAST = "precision, recall, density, coverage", 50
K = 5
ROWS = 1024  # rows of a distance matrix at a time
SPARE = 11  # neighbours beyond K that are kept, so that deleting a group still leaves a K-th one


def distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances of rows of x to all of y, a slice of rows at a time."""
    squares = (y * y).sum(1)
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        square = (part * part).sum(1)[:, None] + squares - 2 * part @ y.T
        yield slice(start, start + len(part)), np.sqrt(square.clip(0))


def neighbours(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances (n, count) and indices of the nearest other rows, nearest first."""
    count = min(count, len(x) - 1)
    near, index = np.empty((len(x), count)), np.empty((len(x), count), dtype=np.int64)
    for where, d in distances(x, x):
        d[np.arange(len(d)), np.arange(where.start, where.stop)] = np.inf
        found = np.argpartition(d, count - 1, 1)[:, :count]
        value = np.take_along_axis(d, found, 1)
        order = np.argsort(value, 1, kind="stable")
        near[where], index[where] = np.take_along_axis(value, order, 1), np.take_along_axis(found, order, 1)
    return near, index


def prdc(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision, recall, density, coverage as (4,), and with each jackknife group of fakes left out (groups, 4)."""
    radius = neighbours(real, K)[0][:, -1]
    groups = groups_of(len(fake))
    count = int(groups.max()) + 1
    near, index = neighbours(fake, K + SPARE)
    radii = np.stack([_radius_without(near, groups[index], g) for g in range(count)])  # (groups, fakes)
    whole = near[:, min(K, near.shape[1]) - 1]
    inside = np.zeros(len(fake))  # real balls that hold each fake
    covered = np.zeros((len(real), count), bool)  # real balls that hold a fake of each group
    recalled = np.zeros(len(real), bool)
    recalled_without = np.zeros((count, len(real)), bool)
    for where, d in distances(real, fake):
        hit = d <= radius[where, None]
        inside += hit.sum(0)
        for g in range(count):
            mine = groups == g
            covered[where, g] = hit[:, mine].any(1)
            recalled_without[g, where] = (d[:, ~mine] <= radii[g, ~mine]).any(1)
        recalled[where] = (d <= whole).any(1)
    value = _scores(inside, recalled.mean(), covered.any(1).mean())
    left_out = [
        _scores(inside[groups != g], recalled_without[g].mean(), np.delete(covered, g, 1).any(1).mean())
        for g in range(count)
    ]
    return value, np.stack(left_out)


def _scores(inside: np.ndarray, recall: float, coverage: float) -> np.ndarray:
    return np.array([(inside > 0).mean(), recall, inside.mean() / K, coverage])


def _radius_without(near: np.ndarray, group: np.ndarray, g: int) -> np.ndarray:
    """Distance of each fake's K-th neighbour outside group g; the farthest kept one where fewer are left."""
    rank = np.cumsum(group != g, 1)
    place = np.where((rank >= K).any(1), (rank >= K).argmax(1), near.shape[1] - 1)
    return near[np.arange(len(near)), place]


def measure(features: FeatureSets) -> list[Measurement]:
    """The four scores of both models and their paired differences."""
    to_original = features.reference is None
    real = features.original if features.reference is None else features.reference
    if to_original:  # the halves that play "real" and "generated" must not be the same images
        half = len(features.original) // 2
        real = features.original[:half]
        first, second = features.original[half:], features.compressed[half:]
    else:
        first, second = features.original, features.compressed
    a, a_left = prdc(real, first)
    b, b_left = (a, a_left) if features.identical else prdc(real, second)
    note = "real: half of the original's images" if to_original else ""
    rows = []
    for place, name in enumerate(("precision", "recall", "density", "coverage")):
        value = float(b[place] - a[place])
        low, high = interval(value, b_left[:, place] - a_left[:, place])
        rows.append(
            Measurement(name, f"{name}, difference", "T4", "", True, value, low, high, n=len(first),
                        original=float(a[place]), compressed=float(b[place]), identical=features.identical, note=note)
        )  # fmt: skip
    return rows
