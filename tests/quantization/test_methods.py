"""The checks of the method cards for SVDQuant, PTQ4DM, PTQ4DiT, HQ-DiT and Q-DiT, and the pieces that they share."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditcompress.engine import Linear
from ditcompress.errors import DitcompressError
from ditcompress.formats.base import resolve
from ditcompress.plan import ActivationSpec, LayerDecision, StepSpec, WeightSpec
from ditcompress.quantization import RecipeSteps, hq_dit, ptq4dit, ptq4dm, q_dit, svdquant
from ditcompress.quantization._knapsack import Choice, hull, path
from ditcompress.quantization._low_rank import low_rank, truncated_svd
from ditcompress.quantization._trial import trial
from ditcompress.quantization.base import Group, Layer

INT4 = {"bits": 4, "layout": "group", "group": 16, "symmetric": True, "scale": "float16"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(tokens: torch.Tensor, buckets: int = 8) -> Any:
    parts = tokens.reshape(buckets, -1, tokens.shape[1])
    return SimpleNamespace(
        low=parts.amin(1), high=parts.amax(1), gram=(tokens.T @ tokens), reservoir=tokens,
        reservoir_bucket=torch.arange(len(tokens)) // (len(tokens) // buckets),
    )  # fmt: skip


def problem(outliers: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (48, 96) and tokens (256, 96) with three loud channels."""
    tokens = torch.randn(256, 96, generator=generator(1))
    tokens[:, [3, 40, 77]] *= outliers
    return torch.randn(48, 96, generator=generator(2)), tokens


def layer(rank: int = 0, smooth: torch.Tensor | None = None, **activation: Any) -> Layer:
    weight, tokens = problem()
    spec = ActivationSpec("token", bits=4, group=16, **activation)
    decision = LayerDecision("layer", "qkv", WeightSpec("int", INT4), spec, rank=rank, low_rank_input="float")
    return Layer(decision, weight, statistics(tokens), smooth, generator=generator())


# --- low rank and knapsack -----------------------------------------------------------------------------------------


def test_randomized_svd_is_close_to_the_exact_one() -> None:
    matrix = torch.randn(200, 300, generator=generator()) @ torch.diag(torch.logspace(0, -3, 300))
    left, values, right = truncated_svd(matrix.double(), 16, generator(1))
    exact = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(values, exact[:16], rtol=5e-3)
    best = exact[16:].square().sum()
    assert (matrix - (left * values) @ right).square().sum() <= best * 1.02


def test_a_weighted_low_rank_part_is_better_under_its_weight_than_a_plain_one() -> None:
    weight, tokens = problem()
    gram = (tokens.T @ tokens).double() + torch.eye(96)

    def cost(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        error = (weight - factors[0].float() @ factors[1].float()).double()
        return ((error @ gram) * error).sum().item()

    assert cost(low_rank(weight, 8, generator(), gram)) < cost(low_rank(weight, 8, generator()))


def test_the_knapsack_equals_trying_everything_at_every_budget_of_its_path() -> None:
    random = torch.Generator().manual_seed(5)
    keep = LayerDecision("x", "qkv", WeightSpec("int"))
    table = []
    for _ in range(4):
        bits = torch.randint(1, 20, (4,), generator=random).tolist()
        costs = torch.rand(4, generator=random).tolist()
        table.append(hull([Choice(b, c, keep) for b, c in zip(bits, costs, strict=True)]))
    for point in path(table):
        totals = [(0, 0.0)]
        for choices in table:
            totals = [(b + c.bits, e + c.cost) for b, e in totals for c in choices]
        assert point.cost <= min(e for b, e in totals if b <= point.bits) + 1e-12
    assert path(table, budget=-1)[-1].places == (0,) * 4


# --- SVDQuant ------------------------------------------------------------------------------------------------------


def test_svdquant_there_are_39_candidates_and_the_first_is_no_smoothing() -> None:
    found = svdquant.candidates(20)
    assert len(found) == 39 and found[0] == (0.0, 0.0)
    assert torch.equal(svdquant.smoothing(torch.rand(5), torch.rand(5), 0.0, 0.0), torch.ones(5))


def test_svdquant_dead_channels_are_left_alone() -> None:
    absmax, weight_max = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 2.0])
    smooth = svdquant.smoothing(absmax, weight_max, 0.5, 0.5)
    assert torch.isfinite(smooth).all() and (smooth > 0).all()


def test_svdquant_the_branch_and_the_residual_are_the_weight() -> None:
    one = layer(rank=8, smooth=torch.rand(96, generator=generator(4)) + 0.5)
    factors, _ = svdquant.iterate(one, svdquant.Params(tokens=64))
    assert factors is not None
    residual = svdquant._without(one.effective_weight(), factors)
    product = factors[0].float() @ factors[1].float()
    assert torch.allclose(residual + product, one.weight * one.smooth, atol=1e-5)
    assert residual.abs().max() < one.effective_weight().abs().max()


def test_svdquant_the_errors_fall_until_the_last_and_the_best_is_kept() -> None:
    one = layer(rank=8)
    factors, errors = svdquant.iterate(one, svdquant.Params(tokens=64))
    assert all(b < a for a, b in itertools.pairwise(errors[:-1]))
    quantized = svdquant._nearest(one, svdquant._without(one.effective_weight(), factors))
    assert svdquant._error(one, trial(one, 64), quantized, factors) == pytest.approx(min(errors), rel=1e-5)


def test_svdquant_smoothing_beats_none_and_rank_0_is_plain_smoothing() -> None:
    params = svdquant.Params(grid=4, tokens=64, iterations=5)
    one = layer(rank=4)
    smooth = svdquant.prepare(Group([one]), params)
    assert svdquant._branch_once(replace(one, smooth=smooth), params) <= svdquant._branch_once(one, params)
    assert svdquant.iterate(layer(rank=0), params) == (None, [])


def test_svdquant_naive_then_svd_then_gptq_get_better() -> None:
    one = layer(rank=8)
    smooth = svdquant.prepare(Group([one]), svdquant.Params(grid=6, tokens=128))
    measured = trial(replace(one, smooth=smooth), 256)
    plain = trial(one, 256)
    rtn = replace(one.decision, rank=0, steps=(StepSpec("rtn"),))
    naive = plain.error(RecipeSteps().encode(Linear(rtn, one.weight, one.statistics, None, 0)).dequantize())

    def with_residual(how: str) -> float:
        params = svdquant.Params(residual=how, iterations=10)  # type: ignore[arg-type]
        found = svdquant.encode(replace(one, smooth=smooth), params)
        assert found.low_rank is not None
        weight = replace(found, low_rank=None).dequantize()
        return measured.error(weight, found.low_rank, "float")

    assert with_residual("gptq") < with_residual("rtn") < naive


# --- PTQ4DM --------------------------------------------------------------------------------------------------------


def test_ptq4dm_ranges_of_gaussian_values_are_those_of_the_card() -> None:
    values = torch.randn(1, 100_000, generator=generator())
    largest = values.abs().max().item()
    for bits, share in ((8, 0.91), (4, 0.58)):
        scale = ptq4dm.symmetric_range(values, bits, 100, 2.4).item()
        assert scale * (2 ** (bits - 1) - 1) / largest == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("low", [0.0, -0.2, -1.0])
def test_ptq4dm_the_static_range_is_never_worse_than_the_extremes(low: float) -> None:
    values = torch.randn(4000, generator=generator()).clamp_min(low)
    params = ptq4dm.Params(zeros=64)
    scale, zero = ptq4dm.asymmetric_range(values, 4, params)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> float:
        codes = (torch.round(values / scale) + zero).clamp(0, 15)
        return (values - (codes - zero) * scale).abs().pow(2.4).mean().item()

    plain = (values.max() - values.min().clamp_max(0)) / 15
    assert error(scale, zero) <= error(plain, torch.round(-values.min().clamp_max(0) / plain)) * (1 + 1e-6)
    assert zero.item() == 0 or low < 0


def test_ptq4dm_refuses_other_layouts() -> None:
    with pytest.raises(DitcompressError, match=r"E202.*layout: row"):
        ptq4dm.encode(layer(), ptq4dm.Params())


# --- PTQ4DiT -------------------------------------------------------------------------------------------------------


def test_ptq4dit_balances_both_maxima_and_ones_need_no_balance() -> None:
    weight, tokens = problem()
    group = Group([Layer(layer().decision, weight, statistics(tokens, buckets=1))])
    s = ptq4dit.prepare(group, ptq4dit.Params())
    assert torch.allclose((tokens / s).abs().amax(0), (weight * s).abs().amax(0), rtol=1e-4)
    ones = Group([Layer(layer().decision, torch.ones(4, 8), statistics(torch.ones(16, 8)))])
    assert torch.allclose(ptq4dit.prepare(ones, ptq4dit.Params()), torch.ones(8))


def test_ptq4dit_rank_correlation_agrees_with_scipy_and_disagreeing_steps_count_more() -> None:
    from scipy.stats import spearmanr

    rows, other = torch.rand(3, 20, generator=generator()), torch.rand(20, generator=generator(1))
    expected = [spearmanr(row, other).statistic for row in rows.numpy()]
    assert ptq4dit.spearman(rows, other).tolist() == pytest.approx(expected, abs=1e-12)
    with_, against = other, 1 - other
    mixed = ptq4dit.salience(torch.stack([with_, against]), other)
    assert (mixed - against).norm() < (mixed - with_).norm()


# --- HQ-DiT --------------------------------------------------------------------------------------------------------


def test_hq_dit_picks_by_the_spread_of_the_weight() -> None:
    uniform = torch.rand(16, 4096, generator=generator()) * 2 - 1
    assert hq_dit.element_for(uniform) == "e1m2"
    assert hq_dit.element_for(torch.randn(16, 4096, generator=generator())) == "e2m1"
    wide = torch.exp(2.5 * torch.randn(16, 4096, generator=generator()))
    assert hq_dit.element_for(wide) == "e3m0"


def test_hq_dit_the_choice_goes_into_the_plan() -> None:
    decision = LayerDecision(
        "layer", "qkv", WeightSpec("fp", {"element": "e3m0"}), steps=(StepSpec("hq_dit"),), rotate=32
    )
    (found,) = hq_dit.choose([decision], lambda name: torch.randn(64, 256, generator=generator()), {}, hq_dit.Params())
    assert found.weight.params["element"] == "e2m1" and "e2m1" in found.reason


# --- Q-DiT ---------------------------------------------------------------------------------------------------------


def test_q_dit_keeps_the_mean_and_is_not_worse_than_its_start() -> None:
    draw = torch.rand(12, 5, generator=generator())
    errors, groups = draw.tolist(), [[32, 64, 128, 192, 288]] * 12
    params = q_dit.Params()
    genes = q_dit.search(errors, groups, params)
    assert sum(groups[i][g] for i, g in enumerate(genes)) / 12 >= 128
    assert sum(e[g] for e, g in zip(errors, genes, strict=True)) < sum(e[2] for e in errors)
    assert genes == q_dit.search(errors, groups, params)
    assert q_dit.search(errors, groups, q_dit.Params(generations=0, population=4, mutation=0.0)) == [2] * 12


def test_q_dit_weight_and_input_get_the_same_group_and_order_within_it_does_not_matter() -> None:
    assert q_dit.allowed(1152, q_dit.Params()) == [32, 64, 128, 192, 288] and q_dit.allowed(100, q_dit.Params()) == [
        100
    ]
    found = q_dit.with_group(layer().decision, 32)
    assert (found.weight.params["group"], found.activation.group) == (32, 32)
    fmt, params = resolve(WeightSpec("int", {**INT4, "group": 32}))
    weight, _ = problem()
    order = torch.cat([torch.randperm(32, generator=generator(i)) + 32 * i for i in range(3)])

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        grid = fmt.fit(matrix, params)
        return fmt.value(fmt.code(matrix, grid, params), grid, params)

    assert torch.equal(rounded(weight)[:, order], rounded(weight[:, order]))
