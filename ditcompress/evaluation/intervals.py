"""95 % intervals: on means, medians and ratios over pairs by bootstrap, on paired proportions by Newcombe's method.

Bootstraps resample pairs, are seeded, and use BCa (Efron 1987) for smooth statistics, percentiles for medians.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

ROUNDS = 2000
Z = 1.959963984540054


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """t interval of a mean; (nan, nan) below two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Distribution-free interval of a median from order statistics (binomial); infinities are allowed."""
    n = len(values)
    if n < 6:
        return float(values.min()), float(values.max())
    ordered = np.sort(values)
    lower = int(stats.binom.ppf(0.025, n, 0.5))
    return float(ordered[max(lower - 1, 0)]), float(ordered[min(n - lower, n - 1)])


def bca_interval(
    rows: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int, rounds: int = ROUNDS
) -> tuple[float, float]:
    """BCa interval of statistic(rows), resampling rows (dimension 0)."""
    n, value = len(rows), statistic(rows)
    random = np.random.default_rng(seed)
    draws = np.array([statistic(rows[random.integers(0, n, n)]) for _ in range(rounds)])
    below = np.clip((draws < value).mean(), 1 / rounds, 1 - 1 / rounds)
    bias = stats.norm.ppf(below)
    jack = (
        np.array([statistic(np.delete(rows, i, 0)) for i in range(n)])
        if n <= 512
        else _grouped_jackknife(rows, statistic)
    )
    centred = jack.mean() - jack
    spread = (centred**2).sum() ** 1.5
    skew = 0.0 if spread == 0 else (centred**3).sum() / (6 * spread)
    points = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-Z, Z)]
    low, high = np.quantile(draws, stats.norm.cdf(points))
    return float(low), float(high)


def _grouped_jackknife(rows: np.ndarray, statistic: Callable[[np.ndarray], float], groups: int = 100) -> np.ndarray:
    parts = np.array_split(np.arange(len(rows)), groups)
    return np.array([statistic(np.delete(rows, part, 0)) for part in parts])


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a proportion; for zero successes its upper end is close to the rule of three."""
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def rare_rate(events: int, n: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate; with no events its upper end is printed instead of 0 (3/n)."""
    if events == 0:
        return 0.0, min(1.0, 3 / n)
    high = 1.0 if events == n else float(stats.beta.ppf(0.975, events + 1, n - events))
    return float(stats.beta.ppf(0.025, events, n - events + 1)), high


def paired_proportion(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Interval of mean(second) - mean(first) for paired successes (booleans).

    Newcombe (1998), method 10: Wilson intervals of both proportions joined with the correlation of the pairs.
    """
    n = len(first)
    a, b = int((first & second).sum()), int((first & ~second).sum())
    c, d = int((~first & second).sum()), int((~first & ~second).sum())
    p1, p2 = (a + b) / n, (a + c) / n
    low1, high1 = wilson(a + b, n)
    low2, high2 = wilson(a + c, n)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0
    if product > 0:
        core = a * d - b * c
        phi = (max(core - n / 2, 0) if core > 0 else core) / math.sqrt(product)
    d1, d2 = p2 - low2, high1 - p1
    e1, e2 = high2 - p2, p1 - low1
    low = p2 - p1 - math.sqrt(max(d1 * d1 - 2 * phi * d1 * d2 + d2 * d2, 0))
    high = p2 - p1 + math.sqrt(max(e1 * e1 - 2 * phi * e1 * e2 + e2 * e2, 0))
    return low, high
