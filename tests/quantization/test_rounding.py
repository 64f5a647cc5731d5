"""GPTQ, coordinate descent and the mixed-precision choice, on their own objective."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ditcompress.engine import Linear
from ditcompress.errors import DitcompressError
from ditcompress.formats import int as fmt
from ditcompress.plan import LayerDecision, StepSpec, WeightSpec
from ditcompress.quantization import RecipeSteps, _rounding, mixed, registry
from ditcompress.quantization.base import step_module

PARAMS = fmt.Params(bits=3, layout="group", group=16, symmetric=False)


def problem(rows: int = 24, columns: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator)
    tokens = torch.randn(400, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), tokens.double().T @ tokens.double()


def cost(weight: torch.Tensor, codes: torch.Tensor, grid: fmt.Grid, hessian: torch.Tensor) -> float:
    error = (weight - fmt.value(codes, grid, PARAMS)).double()
    return torch.einsum("ri,ij,rj->", error, hessian, error).item()


def test_gptq_beats_rounding_and_descent_never_raises_the_objective() -> None:
    weight, gram = problem()
    hessian = _rounding.damped(gram, 0.01, "x")
    grid = fmt.fit(weight, PARAMS)
    nearest = fmt.code(weight, grid, PARAMS)
    codes = _rounding.gptq(weight, hessian, grid, fmt, PARAMS)
    better = _rounding.descend(weight, codes, hessian, grid, fmt, PARAMS, 3)
    rtn, gptq, descended = (cost(weight, c, grid, hessian) for c in (nearest, codes, better))
    assert gptq < 0.7 * rtn
    assert descended <= gptq * (1 + 1e-9)


def test_with_a_diagonal_gram_gptq_is_rounding_to_nearest() -> None:
    weight, _ = problem()
    hessian = torch.diag(torch.rand(48, dtype=torch.float64) + 0.5)
    grid = fmt.fit(weight, PARAMS)
    assert torch.equal(_rounding.gptq(weight, hessian, grid, fmt, PARAMS), fmt.code(weight, grid, PARAMS))


def test_gptq_equals_the_textbook_loop() -> None:
    """Oracle: one column at a time on the explicit inverse, without blocks."""
    weight, gram = problem(8, 80)  # more columns than one block
    hessian = _rounding.damped(gram, 0.01, "x")
    grid = fmt.fit(weight, PARAMS)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(hessian[order][:, order])
    remaining, expected = weight[:, order].double(), torch.empty(8, 80, dtype=torch.int32)
    for j in range(80):
        k = int(order[j])
        chosen = fmt.code(remaining[:, j : j + 1].float(), grid, PARAMS, (8, 80), slice(k, k + 1))
        expected[:, k : k + 1] = chosen
        error = remaining[:, j] - fmt.value(chosen, grid, PARAMS, (8, 80), slice(k, k + 1))[:, 0]
        remaining -= torch.outer(error, inverse[j] / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated; never read again
    found = _rounding.gptq(weight, hessian, grid, fmt, PARAMS)
    assert (found == expected).double().mean() > 0.99  # ties may fall either way in the last digit


def test_the_inverse_factor_by_halves_is_that_of_the_inverse() -> None:
    """Oracle: the Cholesky factor of the explicit inverse, above the order that is inverted directly."""
    tokens = torch.randn(900, 2 * _rounding.HALVED + 83, dtype=torch.float64, generator=torch.manual_seed(0))
    hessian = _rounding.damped(tokens.T @ tokens, 0.01, "x")
    factor = _rounding.inverse_factor(hessian, "x")
    torch.testing.assert_close(factor, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True))
    singular = torch.ones(600, 600, dtype=torch.float64)  # is raised until it has a factor
    assert torch.isfinite(_rounding.inverse_factor(singular, "x")).all()


def test_excess_is_the_difference_of_two_objectives() -> None:
    weight, gram = problem()
    first, second = weight.round(decimals=1), weight.round(decimals=0)
    one, other = (_rounding.objective(weight, q, gram.double()) for q in (first, second))
    torch.testing.assert_close(_rounding.excess(weight, first, second, gram.double()), one - other)


def test_a_dead_channel_and_a_singular_gram_are_survived() -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    hessian = _rounding.damped(gram, 0.01, "x")
    grid = fmt.fit(weight, PARAMS)
    assert torch.isfinite(fmt.value(_rounding.gptq(weight, hessian, grid, fmt, PARAMS), grid, PARAMS)).all()


def test_an_infinite_gram_names_the_layer_and_one_of_zeros_counts_all_weights_alike() -> None:
    with pytest.raises(DitcompressError, match=r"E701.*blocks.3.to_q"):
        _rounding.damped(torch.full((4, 4), float("inf")), 0.01, "blocks.3.to_q")
    assert torch.equal(_rounding.damped(torch.zeros(4, 4), 0.01, "blocks.3.to_q"), torch.eye(4))


def decision(steps: tuple[StepSpec, ...], rank: int = 0, **params: object) -> LayerDecision:
    spec = {"bits": 4, "layout": "group", "group": 16, "symmetric": False, **params}
    return LayerDecision("layer", "qkv", WeightSpec("int", spec), steps=steps, rank=rank)


def statistics(gram: torch.Tensor) -> SimpleNamespace:
    tokens = torch.randn(64, len(gram), generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(
        gram=gram.float(),
        low=tokens.reshape(8, 8, -1).amin(1),
        high=tokens.reshape(8, 8, -1).amax(1),
        reservoir=tokens,
        reservoir_bucket=torch.arange(64) // 8,
    )


ENCODERS = [n for n in registry.names() if hasattr(registry.get(n), "encode") and n not in ("terdit", "vq4dit")]
SHAPES: dict[str, dict[str, object]] = {
    "loftq": {"layout": "column_group"},
    "ptq4dm": {"layout": "row", "symmetric": True},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_deterministic_and_not_worse_than_rounding(name: str) -> None:
    weight, gram = problem()
    shape = SHAPES.get(name, {})
    one = decision((StepSpec(name),), rank=4 if hasattr(registry.get(name), "LOW_RANK") else 0, **shape)
    plain = decision((StepSpec("rtn"),), **shape)
    results = [RecipeSteps().encode(Linear(d, weight, statistics(gram), None, 0)) for d in (one, one, plain)]
    assert all(
        torch.equal(results[0].packed.tensors[k], results[1].packed.tensors[k]) for k in results[0].packed.tensors
    )
    errors = [(weight - r.dequantize()).double() for r in (results[0], results[2])]
    found, rounding = (torch.einsum("ri,ij,rj->", e, gram, e).item() for e in errors)
    assert found <= rounding * (1 + 1e-6)


@pytest.mark.parametrize("name", registry.names())
def test_every_step_refuses_an_unknown_parameter_and_names_the_nearest(name: str) -> None:
    with pytest.raises(DitcompressError, match=r"E202") as caught:
        step_module(StepSpec(name, {"dampp": 1}))
    assert "dampp" in caught.value.line()


def test_mixed_precision_keeps_the_budget_and_widens_the_sensitive_layer() -> None:
    weight, gram = problem()
    steps = (StepSpec("mixed"), StepSpec("gptq"))
    layers = [
        LayerDecision(
            name,
            "qkv",
            WeightSpec("int", {"bits": 4, "layout": "row", "symmetric": False, "scale": "float16"}),
            steps=steps,
        )
        for name in ("calm", "fragile", "also calm")
    ]
    stats = {name: statistics(gram * (1000 if name == "fragile" else 1)) for name in ("calm", "fragile", "also calm")}
    params = mixed.Params(target_bits=6.5)
    chosen = mixed.choose(layers, lambda name: weight, stats, params).layers
    widths = {d.site: d.weight.params["bits"] for d in chosen}
    assert widths["fragile"] > max(widths["calm"], widths["also calm"])
    total = sum(mixed.stored_bits(d, (24, 48)) for d in chosen)
    assert total <= 6.5 * 3 * weight.numel()
    with pytest.raises(DitcompressError, match=r"E202.*the nearest is 4.50 bits"):
        mixed.choose(layers, lambda name: weight, stats, mixed.Params(target_bits=4.0))
