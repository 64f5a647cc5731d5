"""Fréchet distance, MMD and inception score of feature sets, with a delete-a-group jackknife over pairs.

Intervals are of differences against a fixed reference: the bias of one distance at a given number of images cancels in
the difference of two, not in the distance itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import linalg, stats

GROUPS = 20
_ROWS = 1024

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
Moments = tuple[np.ndarray, np.ndarray, float]


def groups_of(n: int, seed: int, count: int = GROUPS) -> np.ndarray:
    """(n,) group numbers of equal size, seeded: images of one class may stand together, or every tenth."""
    return np.random.default_rng(seed).permutation(n) % count


def jackknife_interval(value: float, without: np.ndarray) -> tuple[float, float]:
    """t interval of `value` from its values `without` one group of pairs each."""
    g = len(without)
    half = stats.t.ppf(0.975, g - 1) * math.sqrt((g - 1) / g * ((without - without.mean()) ** 2).sum())
    return float(value - half), float(value + half)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (n, d) and (m, d), as FID (Heusel et al. 2017).

    With C = F^T F / (n - 1), tr (C1 C2)^(1/2) is the sum of the singular values of F1 F2^T over the roots of n - 1,
    which needs no matrix square root and is exact for singular covariances (fewer images than dimensions).
    """
    return 0.0 if np.array_equal(first, second) else _between(_moments(first), _moments(second))


def _between(first: Moments, second: Moments) -> float:
    (mean1, factor1, trace1), (mean2, factor2, trace2) = first, second
    cross = linalg.svdvals(factor1 @ factor2.T).sum()
    return float(((mean1 - mean2) ** 2).sum() + trace1 + trace2 - 2 * cross)


def _moments(x: np.ndarray) -> Moments:
    """Mean, a factor F with F^T F the covariance, and its trace."""
    x = x.astype(np.float64)
    mean = x.mean(0)
    factor = (x - mean) / math.sqrt(len(x) - 1)
    if len(x) > x.shape[1]:
        factor = linalg.qr(factor, mode="r", overwrite_a=True, check_finite=False)[0][: x.shape[1]]
    return mean, factor, float((factor**2).sum())


def frechet_difference(
    original: np.ndarray, compressed: np.ndarray, reference: np.ndarray, seed: int
) -> tuple[float, float, tuple[float, float]]:
    """Distances of both models to the reference, and the interval of compressed minus original."""
    real, groups = _moments(reference), groups_of(len(original), seed)

    def both(kept: np.ndarray) -> tuple[float, float]:
        return _between(_moments(original[kept]), real), _between(_moments(compressed[kept]), real)

    first, second = both(groups >= 0)
    without = [second - first for first, second in (both(groups != g) for g in range(GROUPS))]
    return first, second, jackknife_interval(second - first, np.array(without))


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The cubic kernel of KID (Binkowski et al. 2018): (x y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> np.ndarray:
    """The kernel of CMMD (Jayasumana et al. 2024), of unit features: exp(-||x - y||^2 / (2 sigma^2))."""
    square = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-np.maximum(square, 0) / (2 * sigma**2))


def mmd_paired(original: np.ndarray, compressed: np.ndarray, kernel: Kernel) -> float:
    """U-statistic of the squared MMD between same-noise sets (n, d): the diagonal of the cross kernel, which holds the
    correlated pairs, is left out too, so identical sets give exactly 0."""
    groups = np.zeros(len(original), int)
    if np.array_equal(original, compressed):
        return 0.0
    first, second, cross = (
        _sums(x, y, groups, kernel, same=True).item()
        for x, y in ((original, original), (compressed, compressed), (original, compressed))
    )
    return (first + second - 2 * cross) / (len(original) * (len(original) - 1))


def mmd_difference(
    original: np.ndarray, compressed: np.ndarray, reference: np.ndarray, kernel: Kernel, seed: int
) -> tuple[float, float, tuple[float, float]]:
    """Squared MMD (unbiased) of both models to the reference, and the interval of compressed minus original."""
    groups, m = groups_of(len(original), seed), len(reference)
    every = np.zeros(m, int)
    own = _sums(reference, reference, every, kernel, same=True).item() / (m * (m - 1))
    values = []
    for x in (original, compressed):
        inner, outer = _sums(x, x, groups, kernel, same=True), _sums(x, reference, groups, kernel, same=False)
        counts = np.bincount(groups, minlength=GROUPS)
        left = len(x) - np.concatenate([[0], counts])  # images left: all, then without each group
        inside = inner.sum() - np.concatenate([[0], inner.sum(0) + inner.sum(1) - inner.diagonal()])
        across = outer.sum() - np.concatenate([[0], outer[:, 0]])
        values.append(inside / (left * (left - 1)) + own - 2 * across / (left * m))
    delta = values[1] - values[0]
    return float(values[0][0]), float(values[1][0]), jackknife_interval(float(delta[0]), delta[1:])


def _sums(x: np.ndarray, y: np.ndarray, groups: np.ndarray, kernel: Kernel, *, same: bool) -> np.ndarray:
    """Sums of kernel(x_i, y_j) by group of i and of j, without i = j, where the sets are `same`-noise pairs; by group
    of i, in one column, where not. A block of rows at a time."""
    count = int(groups.max()) + 1
    member = np.eye(count)[groups]
    total = np.zeros((count, count if same else 1))
    for start in range(0, len(x), _ROWS):
        stop = min(start + _ROWS, len(x))
        block = kernel(x[start:stop], y)
        if same:
            block[np.arange(stop - start), np.arange(start, stop)] = 0
        total += member[start:stop].T @ (block @ member if same else block.sum(1, keepdims=True))
    return total


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of p(class | image) from p(class), of all images in one split (Salimans et al. 2016).

    `logits` are (n, classes).
    """
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - np.log(p.mean(0)))).sum(1).mean()))


def score_difference(
    original: np.ndarray, compressed: np.ndarray, seed: int
) -> tuple[float, float, tuple[float, float]]:
    """Inception scores of both models, and the interval of compressed minus original."""
    first, second = inception_score(original), inception_score(compressed)
    groups = groups_of(len(original), seed)
    without = [inception_score(compressed[groups != g]) - inception_score(original[groups != g]) for g in range(GROUPS)]
    return first, second, jackknife_interval(second - first, np.array(without))
