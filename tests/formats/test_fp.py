"""Small floats: the tables of the OCP specification, and torch's own casts bit for bit."""

from __future__ import annotations

import pytest
import torch

from ditcompress.formats import _floats
from ditcompress.formats import fp as fmt

UNIT = fmt.Grid(torch.ones(1, 1))


def every_float(limit: float) -> torch.Tensor:
    """Dense values of all magnitudes with both signs, and every midpoint of a coarse grid (ties)."""
    wide = torch.logspace(-12, 5, 4001)
    ties = torch.arange(0, 4096) / 2**12
    both = torch.cat([wide, ties, ties * 2**-6, ties * 2**8, torch.tensor([0.0, limit, limit * 2])])
    return torch.cat([both, -both])[None]


@pytest.mark.parametrize(
    "element,table",
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e1m2", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
    ],
)
def test_four_bit_tables(element: str, table: list[float]) -> None:
    assert _floats.magnitudes(element).tolist() == table


@pytest.mark.parametrize("element,top,least", [("e2m3", 7.5, 0.125), ("e3m2", 28, 0.0625), ("e4m3", 448, 2**-9)])
def test_largest_and_smallest_magnitudes(element: str, top: float, least: float) -> None:
    assert _floats.largest(element) == top
    assert _floats.magnitudes(element)[1].item() == least


@pytest.mark.parametrize("element,dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_codes_are_those_of_torch(element: str, dtype: torch.dtype) -> None:
    x = every_float(_floats.largest(element))
    theirs = x.clamp(-_floats.largest(element), _floats.largest(element)).to(dtype)
    params = fmt.Params(element=element, layout="tensor")
    codes = fmt.code(x, UNIT, params)
    assert torch.equal(codes.to(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(fmt.value(codes, UNIT, params), theirs.float())


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e3m2"])
def test_six_and_four_bit_codes_are_those_of_torchao(element: str) -> None:
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    cast = {"e2m1": "f32_to_f4_unpacked", "e2m3": "f32_to_f6_e2m3_unpacked", "e3m2": "f32_to_f6_e3m2_unpacked"}
    x = every_float(_floats.largest(element))
    theirs = getattr(kernels, cast[element])(x)
    assert torch.equal(fmt.code(x, UNIT, fmt.Params(element=element, layout="tensor")).to(torch.uint8), theirs)


def test_ties_go_to_the_even_pattern() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25]])
    codes = fmt.code(x, UNIT, fmt.Params(element="e2m1", layout="tensor"))
    assert codes.tolist() == [[0, 2, 2, 4, 4, 6, 6, 8]]


def test_bits_count_every_stored_byte() -> None:
    params = fmt.Params(element="e3m2", layout="group", group=32, scale="float16")
    assert fmt.layout(params, (64, 128)) == {
        "qweight": ((64, 96), torch.uint8),
        "scale": ((64, 4), torch.float16),
    }


@pytest.mark.parametrize("scale", ["float32", "uint8"])
def test_the_clip_search_never_does_worse_than_the_full_range(scale: str) -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w[:, 0] *= 20
    errors = []
    for clip in (1, 20):
        params = fmt.Params(element="e2m1", layout="group", group=16, clip=clip, scale=scale)
        grid = fmt.fit(w, params)
        errors.append((fmt.value(fmt.code(w, grid, params), grid, params) - w).square().sum().item())
    assert errors[1] <= errors[0]
