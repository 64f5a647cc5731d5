"""Maximum mean discrepancy with KID's cubic polynomial kernel (Bińkowski et al. 2018), as a U-statistic.

Between same-noise pairs the cross term must leave out the correlated pairs (i, i): the usual "unbiased" estimator
keeps them and scores identical sets below zero. Without the diagonal identity is exactly 0 (evaluation.md, lesson 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...result import Measurement
from . import FeatureSets
from ._jackknife import groups_of, interval

LABEL, LEAST = "MMD", 20


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x . y / d + 1)^3, (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Blocks:
    """Kernel sums by group: `sums` (groups, groups), and of the diagonal `diagonal` (groups,) where rows are pairs."""

    sums: np.ndarray
    diagonal: np.ndarray
    sizes_x: np.ndarray
    sizes_y: np.ndarray
    paired: bool

    def mean(self, without: int | None = None, columns: bool = True) -> float:
        """Mean over all pairs but (i, i), with one group of rows (and, for `columns`, of columns) left out."""
        rows, cols = np.ones(len(self.sizes_x), bool), np.ones(len(self.sizes_y), bool)
        if without is not None:
            rows[without] = False
            if columns:
                cols[without] = False
        total = self.sums[np.ix_(rows, cols)].sum()
        pairs = float(self.sizes_x[rows].sum()) * float(self.sizes_y[cols].sum())
        if self.paired:
            total, pairs = total - self.diagonal[rows].sum(), pairs - float(self.sizes_x[rows].sum())
        return float(total / pairs)


def blocks(x: np.ndarray, y: np.ndarray, paired: bool) -> Blocks:
    """Kernel sums by blocks of groups; memory is one block, not n x m."""
    gx, gy = groups_of(len(x)), groups_of(len(y))
    parts_x, parts_y = ([z[g == i] for i in range(g.max() + 1)] for z, g in ((x, gx), (y, gy)))
    sums = np.array([[kernel(a, b).sum() for b in parts_y] for a in parts_x])
    diagonal = np.zeros(len(parts_x))
    if paired:
        same = ((x * y).sum(1) / x.shape[1] + 1) ** 3
        diagonal = np.array([same[gx == i].sum() for i in range(len(parts_x))])
    sizes = [np.array([len(p) for p in parts]) for parts in (parts_x, parts_y)]
    return Blocks(sums, diagonal, sizes[0], sizes[1], paired)


def mmd(x: np.ndarray, y: np.ndarray, paired: bool) -> float:
    """U-statistic of MMD^2; `paired` rows share their noise and their (i, i) terms are left out."""
    if paired and np.array_equal(x, y):
        return 0.0
    return blocks(x, x, True).mean() + blocks(y, y, True).mean() - 2 * blocks(x, y, paired).mean()


def measure(features: FeatureSets) -> list[Measurement]:
    """MMD^2 x 1000 to the original, and the difference of both models' MMD^2 to the reference."""
    x, y, n, identical = features.original, features.compressed, len(features.original), features.identical
    xx, yy = blocks(x, x, True), blocks(y, y, True)
    xy = blocks(x, y, True)
    groups = range(len(xx.sizes_x))
    value = 0.0 if identical else xx.mean() + yy.mean() - 2 * xy.mean()
    left_out = np.array([0.0 if identical else xx.mean(g) + yy.mean(g) - 2 * xy.mean(g) for g in groups])
    low, high = interval(1000 * value, 1000 * left_out)
    half = n // 2
    floor = abs(mmd(x[:half], x[half : 2 * half], False))
    said = f"floor: halves of the original, N={half}"
    if features.fresh is not None:
        floor, said = abs(mmd(features.fresh, x, False)), "floor: the original with other noise"
    rows = [
        Measurement("mmd_original", "MMD to the original × 1000", "T4", "", False, 1000 * value, low, high, n=n,
                    floor=1000 * floor, identical=identical, note=said)
    ]  # fmt: skip
    if features.reference is None:
        return rows
    r = features.reference
    rr, xr, yr = blocks(r, r, True), blocks(x, r, False), blocks(y, r, False)
    first, second = (a.mean() + rr.mean() - 2 * b.mean() for a, b in ((xx, xr), (yy, yr)))
    left_out = np.array(
        [yy.mean(g) - 2 * yr.mean(g, columns=False) - xx.mean(g) + 2 * xr.mean(g, columns=False) for g in groups]
    )
    low, high = interval(1000 * (second - first), 1000 * left_out)
    rows.append(
        Measurement("mmd_reference", "MMD to reference × 1000, difference", "T4", "", False, 1000 * (second - first),
                    low, high, n=n, original=1000 * first, compressed=1000 * second, identical=identical)
    )  # fmt: skip
    return rows
