"""Distribution metrics against closed forms and plain loops, and what they must and must not see."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from ditcompress.evaluation import accuracy
from ditcompress.evaluation.digits import digits_folder, load_digit_classifier
from ditcompress.evaluation.distribution import FeatureSets, frechet, measure_all, mmd, prdc, registry
from ditcompress.evaluation.distribution._jackknife import GROUPS, groups_of, interval
from ditcompress.result import Measurement


def draw(seed: int, n: int, d: int = 4, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def exact(seed: int, n: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """n rows whose sample mean and covariance are exactly those."""
    x = draw(seed, n, len(mean))
    x = x - x.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), x.T)
    return (np.linalg.cholesky(covariance) @ white).T + mean


def rows_of(features: FeatureSets) -> dict[str, Measurement]:
    rows, skipped = measure_all(features)
    assert not skipped
    return {m.name: m for m in rows}


def plain_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """By the eigenvalues of the product of covariances, without its symmetric form."""
    a, b, m = np.cov(x, rowvar=False), np.cov(y, rowvar=False), x.mean(0) - y.mean(0)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(m @ m + np.trace(a) + np.trace(b) - 2 * root)


def plain_mmd(x: np.ndarray, y: np.ndarray, paired: bool) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def mean(a: np.ndarray, b: np.ndarray, off: bool) -> float:
        return float(
            np.mean([k(p, q) for (i, p), (j, q) in product(enumerate(a), enumerate(b)) if not (off and i == j)])
        )

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, paired)


def plain_prdc(real: np.ndarray, fake: np.ndarray, k: int = 5) -> list[float]:
    """Straight from the definitions of the two papers."""
    far = np.array([[math.dist(a, b) for b in fake] for a in real])
    of_real = np.array(
        [sorted(math.dist(a, b) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    )
    of_fake = np.array(
        [sorted(math.dist(a, b) for j, b in enumerate(fake) if j != i)[k - 1] for i, a in enumerate(fake)]
    )
    precision = np.mean([any(far[i, j] <= of_real[i] for i in range(len(real))) for j in range(len(fake))])
    recall = np.mean([any(far[i, j] <= of_fake[j] for j in range(len(fake))) for i in range(len(real))])
    density = sum(far[i, j] <= of_real[i] for i in range(len(real)) for j in range(len(fake))) / (k * len(fake))
    coverage = np.mean([far[i].min() <= of_real[i] for i in range(len(real))])
    return [float(v) for v in (precision, recall, density, coverage)]


def test_frechet_of_two_known_gaussians_is_the_closed_form() -> None:
    m1, m2 = np.array([0.3, -1.0]), np.array([1.5, 2.0])
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    product_ = a @ b  # of 2 x 2 matrices the trace of the root is sqrt(tr + 2 sqrt(det))
    root = math.sqrt(np.trace(product_) + 2 * math.sqrt(np.linalg.det(product_)))
    truth = float((m1 - m2) @ (m1 - m2) + np.trace(a) + np.trace(b) - 2 * root)
    x, y = exact(0, 300, m1, a), exact(1, 200, m2, b)
    assert frechet.frechet(x, y) == pytest.approx(truth, rel=1e-6)
    assert frechet.frechet(y, x) == pytest.approx(truth, rel=1e-6)
    assert frechet.frechet(x + 1e4, y + 1e4) == pytest.approx(truth, rel=1e-4)


def test_frechet_rows_and_their_intervals_equal_deletion_by_hand() -> None:
    x, real = draw(0, 83), draw(2, 120, shift=0.2)
    y = x + draw(1, 83, scale=0.3, shift=0.1)
    rows, groups = rows_of(FeatureSets(x, y, real)), np.arange(83) % 20
    difference = plain_frechet(y, real) - plain_frechet(x, real)
    left_out = np.array([plain_frechet(y[groups != g], real) - plain_frechet(x[groups != g], real) for g in range(20)])
    m = rows["fd_reference"]
    assert m.value == pytest.approx(difference, abs=1e-9) and (m.low, m.high) == pytest.approx(
        interval(difference, left_out), abs=1e-8
    )
    assert rows["fd_original"].value == pytest.approx(plain_frechet(x, y), abs=1e-9)
    assert rows["fd_reference_percent"].value == pytest.approx(100 * difference / plain_frechet(x, real))


def test_the_limit_of_the_line_in_one_over_n_removes_the_bias() -> None:
    intercept, slope = frechet.infinite([(n, 3.0 + 40.0 / n) for n in (10, 20, 50, 100)])
    assert (intercept, slope) == pytest.approx((3.0, 40.0))
    x, real = draw(0, 400, 8), draw(1, 20_000, 8)  # one distribution: the truth is 0
    target = frechet.Target(frechet.Moments.of(real))
    points = frechet.curve(x, target, 0)
    assert [n for n, _ in points] == sorted(n for n, _ in points) and points[0][0] == 80 and points[-1][0] == 400
    assert abs(frechet.infinite(points)[0]) < 0.35 * points[-1][1]
    assert points == frechet.curve(x, target, 0)


def test_mmd_and_its_interval_equal_double_loops() -> None:
    x, real = draw(0, 44), draw(2, 30, shift=0.3)
    y = x + draw(1, 44, scale=0.2, shift=0.1)
    assert mmd.mmd(x, y, True) == pytest.approx(plain_mmd(x, y, True), abs=1e-12)
    assert mmd.mmd(x, real, False) == pytest.approx(plain_mmd(x, real, False), abs=1e-12)
    found = {m.name: m for m in mmd.measure(FeatureSets(x, y, real))}
    groups = np.arange(44) % 20
    kept = [groups != g for g in range(20)]
    for name, value in (
        ("mmd_original", lambda keep: plain_mmd(x[keep], y[keep], True)),
        ("mmd_reference", lambda keep: plain_mmd(y[keep], real, False) - plain_mmd(x[keep], real, False)),
    ):
        whole, left_out = 1000 * value(np.ones(44, bool)), 1000 * np.array([value(keep) for keep in kept])
        m = found[name]
        assert m.value == pytest.approx(whole) and (m.low, m.high) == pytest.approx(interval(whole, left_out))


@pytest.mark.parametrize("rows", [1024, 7])
def test_prdc_and_its_deletions_equal_the_definitions(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prdc, "ROWS", rows)
    real, fake = draw(0, 55, 3), draw(1, 60, 3, shift=0.4, scale=0.8)
    value, left_out = prdc.prdc(real, fake)
    assert value == pytest.approx(plain_prdc(real, fake))
    groups = np.arange(60) % 20
    for g in (0, 7, 19):
        assert left_out[g] == pytest.approx(plain_prdc(real, fake[groups != g]))


def test_identical_sets_score_exactly_nothing_or_everything() -> None:
    x = draw(0, 80)
    rows = rows_of(FeatureSets(x, x.copy(), draw(1, 90), draw(2, 80)))
    assert all(m.identical and m.value == 0 and m.low == m.high == 0 for m in rows.values() if m.low is not None)
    assert rows["fd_infinity"].value == 0
    value, _ = prdc.prdc(x, x.copy())
    assert value[[0, 1, 3]] == pytest.approx([1, 1, 1]) and value[2] >= 1
    far = prdc.prdc(x, x + 1e3)[0]
    assert far.tolist() == [0, 0, 0, 0]


def test_two_draws_of_one_distribution_do_not_differ() -> None:
    """A/A: the intervals of differences hold 0, about nineteen times in twenty."""
    held: dict[str, int] = {}
    for seed in range(20):
        both = draw(seed, 400, 5)
        table = FeatureSets(both[:200], both[200:], draw(1000 + seed, 300, 5))
        for name, m in rows_of(table).items():
            if m.low is not None and name != "fd_original":  # a distance is never below 0: it has a floor instead
                assert m.low is not None and m.high is not None
                held[name] = held.get(name, 0) + (m.low <= 0 <= m.high)
    names = ("fd_reference", "fd_reference_percent", "mmd_original", "mmd_reference", "precision", "recall")
    assert set(held) == {*names, "density", "coverage"}
    assert all(times >= 16 for times in held.values()), held


@pytest.mark.parametrize("kept", [1, 8])
def test_a_collapsed_model_is_seen_by_recall_and_coverage_not_by_precision(kept: int) -> None:
    x, real = draw(0, 300), draw(1, 300)
    good = x[np.argsort((x**2).sum(1))[:kept]]  # the most typical images, again and again
    rows = rows_of(FeatureSets(x, good[np.arange(300) % kept], real))
    for name in ("recall", "coverage"):
        m = rows[name]
        assert m.high is not None and m.high < -0.5 and m.compressed is not None and m.compressed < 0.35
    assert rows["precision"].compressed == 1 and rows["fd_reference"].low is not None and rows["fd_reference"].low > 0


def test_rotated_labels_are_seen_by_class_accuracy_and_by_nothing_else() -> None:
    table = load_file(digits_folder() / "reference.safetensors")
    chosen = torch.cat([torch.nonzero(table["labels"].flatten() == c).flatten()[:30] for c in range(10)])
    images, labels = table["images"][chosen], table["labels"].flatten()[chosen].long()
    images = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    model = load_digit_classifier()
    rotated = images.roll(30, 0)  # every class shows the one before it: the same set of images
    with torch.no_grad():
        first, second = (model.features(x).double().numpy() for x in (images, rotated))
        judged = accuracy.Judged(
            model(images).argmax(1).numpy(), model(rotated).argmax(1).numpy(), labels.numpy(), None, False
        )
    assert frechet.frechet(first, second) < 1e-6 * np.trace(np.cov(first, rowvar=False))
    assert prdc.prdc(first, second)[0][[0, 1, 3]] == pytest.approx([1, 1, 1])
    rows = {m.name: m for m in accuracy.measurements(judged, "")}
    found = rows["class_accuracy"]
    assert found.original is not None and found.original > 95 and found.compressed is not None and found.compressed < 5
    assert found.high is not None and found.high < -85
    assert rows["label_flips"].value is not None and rows["label_flips"].value > 90
    assert all(c["n"] == 30 and c["original"] > c["compressed"] for c in accuracy.per_class(judged))


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    widths = []
    for seed in range(40):
        values = np.random.default_rng(seed).exponential(2.0, 400)
        groups = groups_of(400)
        low, high = interval(values.mean(), np.array([values[groups != g].mean() for g in range(GROUPS)]))
        of_groups = [values[groups == g].mean() for g in range(GROUPS)]
        exact_ = stats.ttest_1samp(of_groups, 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((exact_.low, exact_.high))
        widths.append((high - low) / (2 * stats.t.ppf(0.975, GROUPS - 1) * values.std(ddof=1) / 20))
    assert np.mean(widths) == pytest.approx(1, abs=0.08)
    assert all(math.isnan(v) for v in (*interval(1.0, np.array([1.0])), *interval(1.0, np.array([1.0, math.nan]))))
    assert groups_of(7).tolist() == list(range(7))


def test_too_few_images_and_features_that_are_not_finite_are_skipped_with_their_code() -> None:
    _, skipped = measure_all(FeatureSets(draw(0, 30), draw(1, 30)))
    assert {s.code for s in skipped} == {"E334"} and all("30 images" in s.reason for s in skipped)
    assert {s.name for s in skipped} == {registry.get(n).LABEL for n in ("frechet", "prdc")}
    holed = draw(1, 60)
    holed[3, 2] = math.inf
    for table in (
        FeatureSets(draw(0, 60), holed),
        FeatureSets(draw(0, 60), draw(1, 60), holed),
        FeatureSets(draw(0, 60), draw(1, 60), None, holed),
    ):
        rows, skipped = measure_all(table)
        assert not rows and {s.code for s in skipped} == {"E334"} and all("not finite" in s.reason for s in skipped)
    assert "mostly bias below 40" in FeatureSets(draw(0, 30), draw(1, 30)).note
