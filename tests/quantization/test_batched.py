"""Weights of equal shape that are rounded together get what each gets alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditcompress.errors import DitcompressError
from ditcompress.formats import int as fmt
from ditcompress.plan import LayerDecision, WeightSpec
from ditcompress.quantization import _rounding, gptq
from ditcompress.quantization.base import Layer

PARAMS = gptq.Params(sweeps=2, refit=3)
FORMATS: dict[str, dict[str, Any]] = {
    "int": {"bits": 3, "layout": "group", "group": 16, "symmetric": False, "scale": "uint8", "clip": 5},
    "int a tensor": {"bits": 4, "layout": "tensor"},
    "fp": {"element": "e2m1", "layout": "group", "group": 16},
    "nf4": {"block": 16},
    "mx": {"element": "e2m1", "scale": "best"},
    "nvfp4": {"four_over_six": True},
    "ternary": {"layout": "row", "fit": "least_squares"},
    "vq": {"bits": 4, "dim": 5, "row_scale": True},
    "vq of rows": {"bits": 3, "dim": 2, "rows": 12},
}


def layers(given: str, count: int = 4, rank: int = 0, shape: tuple[int, int] = (24, 48)) -> list[Layer]:
    """Linears whose inputs differ in everything: their columns are visited in orders of their own."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        mix = torch.randn(shape[1], shape[1], generator=generator) / 7 + torch.eye(shape[1])
        tokens = torch.randn(300, shape[1], generator=generator) @ mix
        tokens = tokens * torch.linspace(0.3, 2, shape[1])[torch.randperm(shape[1], generator=generator)]
        decision = LayerDecision(f"linear.{number}", "qkv", WeightSpec(given.split()[0], FORMATS[given]), rank=rank)
        weight = torch.randn(shape, generator=generator) * 2.0**number
        statistics: Any = SimpleNamespace(gram=tokens.T @ tokens)
        made.append(Layer(decision, weight, statistics, generator=generator))
    return made


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("given", FORMATS)
def test_together_or_alone_gives_the_same(given: str, rank: int) -> None:
    together = gptq.encode_many(layers(given, rank=rank), PARAMS)
    for found, layer in zip(together, layers(given, rank=rank), strict=True):
        alone = gptq.encode(layer, PARAMS)
        assert torch.equal(found.packed.tensors["qweight"], alone.packed.tensors["qweight"])
        assert torch.allclose(found.dequantize(), alone.dequantize(), rtol=1e-3, atol=1e-5)


def test_refitting_ends_for_each_weight_by_itself() -> None:
    """One that is on its grid already gains nothing in its first round, whatever the others do."""
    some = layers("int a tensor", 3)
    weights = [layer.weight for layer in some]
    params = fmt.Params(bits=4, layout="tensor")
    first = fmt.fit(weights[0], params)
    weights[0] = fmt.value(fmt.code(weights[0], first, params), first, params)
    grids = [first, *(fmt.fit(w, params) for w in weights[1:])]
    codes = torch.cat([fmt.code(w, grid, params) for w, grid in zip(weights, grids, strict=True)])
    hessian = torch.stack([_rounding.damped(layer.gram(), 0.01, layer.name) for layer in some])
    found, after = _rounding.alternate(torch.cat(weights), codes, hessian, grids, fmt, params, 3, 2)
    assert torch.equal(found[:24], codes[:24]) and after[0] is first
    assert after[1] is not grids[1] and not torch.equal(found[24:], codes[24:])


def test_a_singular_matrix_gets_more_damping_and_its_neighbours_do_not() -> None:
    some = layers("int", 3)
    weight = torch.cat([layer.weight for layer in some])
    hessian = torch.stack([_rounding.damped(layer.gram(), 0.01, layer.name) for layer in some])
    values, vectors = torch.linalg.eigh(hessian[1])
    values[0] = -1e-5
    hessian[1] = vectors @ torch.diag(values) @ vectors.T
    assert torch.linalg.cholesky_ex(hessian[1]).info
    params = fmt.Params(**FORMATS["int"])
    grids = [fmt.fit(layer.weight, params) for layer in some]
    found = _rounding.gptq(weight, hessian, _rounding.stacked(grids, fmt, (24, 48)), fmt, params)
    for layer, one, grid, part in zip(some, hessian, grids, found.chunk(3), strict=True):
        assert torch.equal(part, _rounding.gptq(layer.weight, one, grid, fmt, params))


@pytest.mark.parametrize("bad", ["infinite", "indefinite"])
def test_a_failure_names_its_layer(bad: str) -> None:
    some = layers("int", 3)
    gram = torch.full((48, 48), torch.inf)
    if bad == "indefinite":
        gram = some[2].gram().float() - 100 * torch.eye(48) * some[2].gram().mean()
    broken = SimpleNamespace(gram=gram)
    some[2] = Layer(some[2].decision, some[2].weight, broken)  # type: ignore[arg-type]
    with pytest.raises(DitcompressError, match=r"E701.*linear\.2"):
        gptq.encode_many(some, PARAMS)
