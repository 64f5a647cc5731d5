"""Metrics, intervals and the verdict against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ditcompress.errors import DitcompressError
from ditcompress.evaluation import intervals, metrics
from ditcompress.evaluation.verdict import FAIL, INCONCLUSIVE, PASS, Margin, decide, gate, margins_of
from ditcompress.measures import output_sqnr_db, ratio_db, sqnr_db
from ditcompress.result import Measurement, clean


def images(n: int = 6, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", metrics.registry.names())
def test_identical_images_give_the_ideal_value_in_any_order(name: str) -> None:
    metric, x = metrics.registry.get(name), images()
    assert (metric.values(x, x, 2.0) == metric.IDEAL).all()
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values, order = metric.values(x, y, 2.0), torch.randperm(6)
    assert torch.equal(metric.values(x[order], y[order], 2.0), values[order])
    assert torch.allclose(
        torch.cat([metric.values(a, b, 2.0) for a, b in zip(x.split(2), y.split(2), strict=True)]), values
    )


@pytest.mark.parametrize("decibel", [10.0, 25.0, 60.0])
def test_psnr_of_planted_noise(decibel: float) -> None:
    x = images()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise /= noise.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    y = x.double() + noise * 2 / 10 ** (decibel / 20)
    found = metrics.registry.get("psnr").values(x, y, 2.0)
    assert (found - decibel).abs().max() < 0.01


@pytest.mark.parametrize("size", [8, 16])
def test_ssim_equals_a_loop_over_windows(size: int) -> None:
    x = images(2, size)
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).clamp(-1, 1)
    ssim = metrics.registry.get("ssim")
    width = 11 if size > 11 else 7
    kernel = ssim.window(width).numpy()
    expected = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        values = []
        for c in range(3):
            for i in range(size - width + 1):
                for j in range(size - width + 1):
                    p, q = a[c, i : i + width, j : j + width], b[c, i : i + width, j : j + width]
                    mp, mq = (kernel * p).sum(), (kernel * q).sum()
                    vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
                    cov = (kernel * (p - mp) * (q - mq)).sum()
                    c1, c2 = 0.02**2, 0.06**2
                    values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        expected.append(np.mean(values))
    assert np.allclose(ssim.values(x, y, 2.0).numpy(), expected, atol=1e-9)


def test_sqnr_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    y = x + torch.tensor([[0.5, 0.0], [0.0, 0.2]])
    assert sqnr_db(x, y) == pytest.approx(-10 * math.log10((0.25 + 0.04) / 29))
    assert output_sqnr_db(x, y) == pytest.approx(-10 * math.log10((0.25 / 25 + 0.04 / 4) / 2))
    assert sqnr_db(x, x) == math.inf and ratio_db(0) == math.inf


@pytest.mark.parametrize("kind", ["mean", "median", "bca"])
def test_nominal_95_percent_intervals_cover_about_95_percent(kind: str) -> None:
    random, hits, rounds = np.random.default_rng(0), 0, 200
    for number in range(rounds):
        values = random.lognormal(0, 0.5, 150)
        if kind == "mean":
            (low, high), truth = intervals.mean_interval(values), math.exp(0.125)
        elif kind == "median":
            (low, high), truth = intervals.median_interval(values), 1.0
        else:
            low, high = intervals.bca_interval(values[:, None], lambda r: float(r.mean()), number, rounds=500)
            truth = math.exp(0.125)
        hits += low <= truth <= high
    assert 0.89 <= hits / rounds <= 0.995


def test_no_event_in_n_is_bounded_by_three_over_n_and_never_zero() -> None:
    assert intervals.rare_rate(0, 300) == (0.0, 0.01)
    low, high = intervals.rare_rate(3, 300)
    assert 0 < low < 0.01 < high < 0.03
    low, high = intervals.paired_proportion(np.ones(200, bool), np.ones(200, bool))
    assert low < 0 < high and high - low < 0.04


def test_paired_proportion_covers_a_known_difference() -> None:
    random, hits = np.random.default_rng(1), 0
    for _ in range(300):
        first = random.random(150) < 0.9
        second = np.where(random.random(150) < 0.1, random.random(150) < 0.4, first)  # the pairs are correlated
        low, high = intervals.paired_proportion(first, second)
        hits += low <= -0.05 <= high
    assert 0.9 <= hits / 300 <= 0.995


def measured(low: float, high: float, name: str = "psnr") -> Measurement:
    return Measurement(name, name, "T3", "dB", True, (low + high) / 2, low, high, n=64)


def test_the_verdict_has_three_values_and_says_what_would_decide() -> None:
    margin = Margin("psnr", least=25)
    assert gate(measured(26, 30), margin).gate == PASS
    assert gate(measured(20, 24), margin).gate == FAIL
    open_ = gate(measured(24, 27), margin)
    assert open_.gate == INCONCLUSIVE and "pairs would decide" in open_.note
    assert gate(Measurement("psnr", "", "T3", "dB", True, None, identical=True), margin).gate == PASS
    assert gate(Measurement("psnr", "", "T3", "dB", True, float("nan")), margin).gate == INCONCLUSIVE


def test_all_gates_must_pass_and_a_broken_model_fails() -> None:
    margins = (Margin("a", least=25), Margin("b", least=25))
    good, bad, vague = (measured(*span) for span in ((26, 30), (1, 2), (24, 27)))
    rows = lambda x, y: [Measurement(**{**vars(x), "name": "a"}), Measurement(**{**vars(y), "name": "b"})]  # noqa: E731
    assert decide(rows(good, good), margins, False)[0] == PASS
    assert decide(rows(good, bad), margins, False)[0] == FAIL
    assert decide(rows(good, vague), margins, False)[0] == INCONCLUSIVE
    assert decide(rows(good, good), margins, True)[0] == FAIL
    assert decide(rows(good, good)[:1], margins, False)[0] == INCONCLUSIVE


def test_margins_are_declared_by_name() -> None:
    assert {m.measurement: m.least for m in margins_of("fidelity", {"psnr": 30})}["psnr"] == 30
    for call in (lambda: margins_of("fidelty", {}), lambda: margins_of("fidelity", {"pnsr": 1})):
        with pytest.raises(DitcompressError, match=r"E203.*did you mean"):
            call()


def test_json_holds_no_infinity() -> None:
    assert clean({"a": [math.inf, 1.0], "b": float("nan")}) == {"a": [None, 1.0], "b": None}
