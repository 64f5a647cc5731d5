"""What every registered format promises, over the parameters in CASES; a new format fails until it has a row."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ditcompress.formats.base import PackedWeight, dequantize, is_int8, registry, stackable, stored_layout
from ditcompress.plan import WeightSpec
from ditcompress.quantization import _rounding

CASES: dict[str, list[dict[str, Any]]] = {
    "int": [
        {"bits": 8},
        {"bits": 2, "layout": "tensor"},
        {"bits": 4, "layout": "group", "group": 16, "symmetric": False, "scale": "uint8"},
        {"bits": 3, "layout": "group", "group": 16, "scale": "bfloat16", "clip": 10},
        {"bits": 4, "layout": "group", "group": 16, "symmetric": False, "scale": "uint4", "clip": 10},
        {"bits": 2, "layout": "group", "group": 8, "scale": "uint4"},
    ],
    "fp": [
        *({"element": e, "layout": "row"} for e in ("e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2")),
        {"element": "e4m3", "layout": "tensor", "scale": "bfloat16"},
        {"element": "e2m1", "layout": "group", "group": 16, "scale": "float16", "clip": 12},
        {"element": "e3m0", "layout": "group", "group": 16, "scale": "uint8", "clip": 12},
    ],
    "nf4": [{}, {"block": 16, "scale": "float16", "clip": 8}, {"block": 32, "scale": "uint8"}, {"scale": "bfloat16"}],
    "mx": [
        *({"element": e} for e in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")),
        {"element": "e2m1", "scale": "best"},
        {"element": "e3m2", "scale": "even"},
    ],
    "nvfp4": [{}, {"four_over_six": True}, {"clip": 8, "four_over_six": True}],
    "ternary": [
        {},
        {"layout": "tensor", "packing": "base3"},
        {"layout": "group", "group": 16, "scale": "uint8", "fit": "least_squares"},
        {"layout": "row", "scale": "float16", "packing": "base3", "fit": "least_squares"},
    ],
    "vq": [
        {"bits": 6},
        {"bits": 4, "dim": 3, "row_scale": True},
        {"bits": 5, "dim": 2, "rows": 16, "init": "random"},
        {"bits": 10, "dim": 8, "rows": 24, "row_scale": True, "iterations": 4},
        {"bits": 4, "samples": 64},
        {"bits": 12, "dim": 1, "iterations": 2},
    ],
}
SHAPES = {"even": (64, 96), "ragged": (37, 50), "one row": (1, 33)}
ROWS = [(name, params) for name, rows in CASES.items() for params in rows]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in params.items())}" for name, params in ROWS]
every_format = pytest.mark.parametrize("name,given", ROWS, ids=IDS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made(name: str, given: dict[str, Any], w: torch.Tensor) -> tuple[ModuleType, Any, Any, torch.Tensor]:
    fmt = registry.get(name)
    params = fmt.Params(**given)
    grid = fmt.fit(w, params)
    return fmt, params, grid, fmt.code(w, grid, params)


def columns_together(fmt: ModuleType, params: Any) -> int:
    return fmt.width(params) if hasattr(fmt, "width") else 1


def test_every_registered_format_has_cases() -> None:
    assert set(registry.names()) == set(CASES)


@every_shape
@every_format
def test_what_is_stored_is_what_was_declared_and_reads_back(
    name: str, given: dict[str, Any], shape: tuple[int, int]
) -> None:
    w = weight(shape)
    fmt, params, grid, codes = made(name, given, w)
    assert codes.dtype == torch.int32 and codes.shape == shape
    values = fmt.value(codes, grid, params)
    assert values.dtype == torch.float32 and values.shape == shape
    spec = WeightSpec(name, given)
    tensors = fmt.pack(codes, grid, params)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == stored_layout(spec, shape)
    assert all(t.is_contiguous() for t in tensors.values())
    again, grid_again = fmt.unpack(tensors, params, shape)
    assert torch.equal(again, codes)
    assert torch.equal(fmt.value(again, grid_again, params), values)
    assert torch.equal(dequantize(spec, tensors, shape), values)
    assert torch.equal(fmt.code(w, grid_again, params), codes), "a grid that was stored codes differently"
    declared = sum(torch.Size(s).numel() * d.itemsize for s, d in stored_layout(spec, shape).values())
    assert PackedWeight(spec, shape, tensors).stored_bytes == declared


@every_shape
@every_format
def test_coding_a_decoded_weight_changes_nothing(name: str, given: dict[str, Any], shape: tuple[int, int]) -> None:
    fmt, params, grid, codes = made(name, given, weight(shape))
    values = fmt.value(codes, grid, params)
    assert torch.equal(fmt.value(fmt.code(values, grid, params), grid, params), values)


@every_format
def test_a_range_of_columns_is_coded_as_in_the_whole(name: str, given: dict[str, Any]) -> None:
    shape = (37, 50)
    w = weight(shape)
    fmt, params, grid, codes = made(name, given, w)
    values, step = fmt.value(codes, grid, params), columns_together(fmt, params)
    for start in range(0, shape[1], step):
        part = slice(start, min(start + step, shape[1]))
        assert torch.equal(fmt.code(w[:, part], grid, params, shape, part), codes[:, part])
        assert torch.equal(fmt.value(codes[:, part], grid, params, shape, part), values[:, part])


@every_format
def test_codes_are_the_nearest_of_a_brute_force_search(name: str, given: dict[str, Any]) -> None:
    """In float64, over every code that occurs; for vectors over the whole vector."""
    shape = (37, 50)
    w = weight(shape)
    fmt, params, grid, codes = made(name, given, w)
    step = columns_together(fmt, params)

    def distance(candidate: torch.Tensor) -> torch.Tensor:
        error = (fmt.value(candidate, grid, params).double() - w.double()).square()
        padded = torch.nn.functional.pad(error, (0, -shape[1] % step))
        return padded.reshape(shape[0], -1, step).sum(-1)

    least = torch.stack([distance(torch.full_like(codes, int(c))) for c in codes.unique()]).amin(0)
    assert torch.all(distance(codes) <= least * (1 + 1e-5) + 1e-12)


@every_format
@pytest.mark.parametrize("kind", ["zero", "equal", "tiny", "huge", "mixed"])
def test_extreme_weights_stay_finite(name: str, given: dict[str, Any], kind: str) -> None:
    w = weight((24, 50))
    mixed = w * torch.logspace(-6, 4, 24)[:, None]
    w = {"zero": w * 0, "equal": torch.full_like(w, 0.25), "tiny": w * 1e-6, "huge": w * 1e4, "mixed": mixed}[kind]
    fmt, params, grid, codes = made(name, given, w)
    values = fmt.value(codes, grid, params)
    assert torch.isfinite(values).all()
    assert torch.equal(fmt.value(fmt.code(values, grid, params), grid, params), values)
    again, grid_again = fmt.unpack(fmt.pack(codes, grid, params), params, (24, 50))
    assert torch.equal(fmt.value(again, grid_again, params), values)
    if kind == "zero":
        assert not values.any()
    if kind == "huge":
        assert (values - w).norm() < w.norm()


@every_format
def test_importance_and_search_are_accepted(name: str, given: dict[str, Any]) -> None:
    w = weight((37, 50))
    fmt = registry.get(name)
    params = fmt.Params(**given)
    grid = fmt.fit(w, params, torch.linspace(0.1, 10, 50))
    assert torch.isfinite(fmt.value(fmt.code(w, grid, params), grid, params)).all()


@every_format
def test_second_order_rounding_is_never_worse_than_plain_rounding(name: str, given: dict[str, Any]) -> None:
    w = weight((24, 50))
    fmt, params, grid, plain = made(name, given, w)
    if columns_together(fmt, params) > 1:
        pytest.skip("GPTQ visits single columns")
    mixing = torch.randn(50, 50, generator=torch.Generator().manual_seed(1)) / 5 + torch.eye(50)
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(2)) @ mixing
    hessian = _rounding.damped(x.T @ x, 0.01, "test")

    def loss(codes: torch.Tensor) -> float:
        return _rounding.objective(w, fmt.value(codes, grid, params), hessian).sum().item()

    better = _rounding.gptq(w, hessian, grid, fmt, params)
    assert loss(better) <= loss(plain)
    assert loss(_rounding.descend(w, better, hessian, grid, fmt, params, 3)) <= loss(better) * (1 + 1e-5)
    assert loss(_rounding.descend(w, plain, hessian, grid, fmt, params, 3)) <= loss(plain) * (1 + 1e-5)


@every_format
def test_weights_one_under_the_other_are_coded_as_each_alone(name: str, given: dict[str, Any]) -> None:
    """With a stacked grid, for whole weights and where each stands at columns of its own."""
    shape = (48, 50)
    ws = [weight(shape), 3 * weight(shape).flip(0, 1)]
    fmt, params = registry.get(name), registry.get(name).Params(**given)
    assert stackable(WeightSpec(name, given), shape[0])
    grids = [fmt.fit(w, params) for w in ws]
    alone = [fmt.code(w, grid, params) for w, grid in zip(ws, grids, strict=True)]
    values = torch.cat([fmt.value(c, grid, params) for c, grid in zip(alone, grids, strict=True)])
    w, codes, grid = torch.cat(ws), torch.cat(alone), _rounding.stacked(grids, fmt, shape)
    assert torch.equal(fmt.code(w, grid, params), codes)
    assert torch.equal(fmt.value(codes, grid, params), values)
    step = columns_together(fmt, params)
    places = torch.stack([torch.arange(step), torch.arange(step) + 5 * step]).repeat_interleave(shape[0], 0)
    found = fmt.code(w.gather(1, places), grid, params, tuple(w.shape), places)
    assert torch.equal(found.long(), codes.gather(1, places).long())
    assert torch.equal(fmt.value(found, grid, params, tuple(w.shape), places), values.gather(1, places))


def test_what_ties_rows_of_two_weights_together_is_not_stacked() -> None:
    assert not stackable(WeightSpec("int", {"layout": "column_group"}), 48)
    assert not stackable(WeightSpec("vq", {"rows": 32}), 48)


INT8 = {"int": (True, True, False, False, True, True), "ternary": (True, True, False, True)}


@every_shape
@every_format
def test_an_int8_form_is_exactly_the_decoded_weight(name: str, given: dict[str, Any], shape: tuple[int, int]) -> None:
    module = registry.get(name)
    params = module.Params(**given)
    w = weight(shape)
    grid = module.fit(w, params)
    tensors = module.pack(module.code(w, grid, params), grid, params)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    spec = WeightSpec(name, given)
    assert is_int8(spec) == (name in INT8 and INT8[name][CASES[name].index(given)])
    if is_int8(spec):
        codes, scale = module.as_int8(tensors, params, shape)
        assert codes.dtype == torch.int8 and codes.shape == shape and scale.shape == (shape[0], 1)
        oracle = dequantize(spec, tensors, shape).double()
        assert torch.allclose(codes.double() * scale.double(), oracle, rtol=1e-6, atol=0)
        assert int(codes.int().abs().max()) <= 127
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors.items())
