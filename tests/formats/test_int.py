"""The integer format: every layout against a float64 oracle, exact round trips, exact byte counts."""

from __future__ import annotations

import itertools

import pytest
import torch

from ditcompress.formats import _bits
from ditcompress.formats import int as fmt
from ditcompress.formats.base import PackedWeight, dequantize, stored_layout
from ditcompress.plan import WeightSpec

LAYOUTS = ("tensor", "row", "group", "column_group")
SHAPES = {"even": (64, 96), "ragged": (37, 50), "one row": (1, 33)}


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [*range(1, 9), 10, 12, 16])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_packing_bits_is_exact_at_every_width(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(1))
    codes = codes.to(torch.uint8 if bits <= 8 else torch.int32)
    packed = _bits.pack_bits(codes, bits)
    assert packed.shape == (5, (columns * bits + 7) // 8)
    assert torch.equal(_bits.unpack_bits(packed, bits, columns), codes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout,bits,symmetric", list(itertools.product(LAYOUTS, (2, 3, 4, 5, 8), (True, False))))
def test_pack_then_unpack_gives_the_same_values(
    layout: str, bits: int, symmetric: bool, shape: tuple[int, int]
) -> None:
    params = fmt.Params(bits=bits, layout=layout, symmetric=symmetric)
    w = weight(shape)
    grid = fmt.fit(w, params)
    codes = fmt.code(w, grid, params)
    tensors = fmt.pack(codes, grid, params)
    declared = fmt.layout(params, shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == declared
    again, grid_again = fmt.unpack(tensors, params, shape)
    assert torch.equal(again, codes)
    assert torch.equal(fmt.value(again, grid_again, params), fmt.value(codes, grid, params))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_the_nearest_of_a_brute_force_search(layout: str, symmetric: bool) -> None:
    params = fmt.Params(bits=3, layout=layout, group=8, symmetric=symmetric)
    w = weight((16, 24)).double()
    grid = fmt.fit(w.float(), params)
    codes = fmt.code(w.float(), grid, params)
    low, high = (-3, 3) if symmetric else (0, 7)
    candidates = torch.stack(
        [fmt.value(torch.full(w.shape, c, dtype=torch.int32), grid, params).double() for c in range(low, high + 1)]
    )
    best = (candidates - w).abs().amin(0)
    chosen = (fmt.value(codes, grid, params).double() - w).abs()
    assert torch.allclose(chosen, best, atol=1e-6)


def test_a_column_group_scale_is_shared_by_rows_spaced_apart() -> None:
    """DiTAS, card: 32 weights of one input column, taken from rows N / 32 apart."""
    params = fmt.Params(bits=4, layout="column_group", group=32, symmetric=False, zero="int16", levels="full")
    w = weight((64, 8))
    grid = fmt.fit(w, params)
    rows = torch.arange(1, 64, 2)  # N / 32 = 2: rows 1, 3, 5, ... form one group
    column = w[rows, 3]
    assert grid.scale.shape == (2, 8)
    assert torch.isclose(grid.scale[1, 3], (column.max() - column.min()) / 16)


def test_scaling_columns_folds_exactly_into_column_group_scales() -> None:
    params = fmt.Params(bits=4, layout="column_group", group=32, symmetric=False, zero="int16", levels="full")
    w, s = weight((64, 8)), torch.rand(8) + 0.5
    grid = fmt.fit(w, params)
    codes = fmt.code(w, grid, params)
    folded = fmt.Grid(grid.scale * s, grid.zero)
    assert torch.allclose(fmt.value(codes, folded, params), fmt.value(codes, grid, params) * s, rtol=1e-6)


def test_two_level_scales_read_back_as_they_were_used() -> None:
    params = fmt.Params(bits=4, layout="group", group=16, symmetric=False, scale="uint8")
    w = weight((24, 80)) * torch.logspace(-2, 1, 24)[:, None]
    grid = fmt.fit(w, params)
    codes = fmt.code(w, grid, params)
    _, again = fmt.unpack(fmt.pack(codes, grid, params), params, (24, 80))
    assert torch.equal(again.scale, grid.scale)


def test_bits_count_every_stored_byte() -> None:
    spec = WeightSpec("int", {"bits": 4, "layout": "group", "group": 32, "symmetric": False, "scale": "uint8"})
    params = fmt.Params(**spec.params)
    w = weight((64, 128))
    grid = fmt.fit(w, params)
    packed = PackedWeight(spec, (64, 128), fmt.pack(fmt.code(w, grid, params), grid, params))
    assert packed.stored_bytes == 64 * 64 + 64 * 4 + 64 * 2 + 64 * 2  # codes, scales, row scales, zeros
    assert packed.bits == pytest.approx(4 + 8 / 32 + 4 / 32 + 16 / 128)
    assert sum(torch.Size(s).numel() * d.itemsize for s, d in stored_layout(spec, (64, 128)).values()) == 64 * 72
    assert dequantize(spec, packed.tensors, (64, 128)).shape == (64, 128)


def test_the_clip_search_never_does_worse_than_the_full_range() -> None:
    w = weight((32, 64))
    w[:, 0] *= 20
    errors = []
    for clip in (1, 20):
        params = fmt.Params(bits=3, layout="row", clip=clip)
        grid = fmt.fit(w, params)
        errors.append((fmt.value(fmt.code(w, grid, params), grid, params) - w).square().sum().item())
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_leave_no_room_for_a_number_of_the_group(symmetric: bool) -> None:
    with pytest.raises(ValueError, match="leaves room for 7 bits"):
        fmt.Params(bits=8, layout="group", symmetric=symmetric, scale="uint4")
